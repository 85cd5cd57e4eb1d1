// From a finished sum to an output: times the channel's factor, plus bias, shifted to the output format, saturated. Combinational.
module requantizer #(
    parameter int ACC_BITS = 32,
    parameter int FACTOR_BITS = 8,  // of the channel's factor, unsigned; applied by shifts and adds, one a bit
    parameter int SHIFT_BITS = 12,  // of the places to the right, signed
    parameter int LOW = 0,
    parameter int HIGH = 255
) (
    input logic signed [ACC_BITS-1:0] sum,
    input logic [FACTOR_BITS-1:0] factor,
    input logic signed [ACC_BITS-1:0] bias,
    input logic signed [SHIFT_BITS-1:0] right,
    output logic signed [31:0] y
);
  logic signed [63:0] wide;
  assign wide = {{(64 - ACC_BITS) {sum[ACC_BITS-1]}}, sum};
  for (genvar b = 0; b < FACTOR_BITS; b++) begin : g_bit
    logic signed [63:0] term, so_far;
    assign term = factor[b] ? wide <<< b : '0;
    if (b == 0) begin : g_first
      assign so_far = term;
    end else begin : g_next
      assign so_far = g_bit[b-1].so_far + term;
    end
  end

  logic signed [63:0] total, shifted;
  logic [5:0] places, left;
  assign total = g_bit[FACTOR_BITS-1].so_far + {{(64 - ACC_BITS) {bias[ACC_BITS-1]}}, bias};
  assign places = 6'(right);
  assign left = 6'(-right);
  // to the right: to nearest, ties up; more than 62 places leave nothing
  assign shifted = right <= 0 ? total <<< left : right > 62 ? 64'sd0 : (total + (64'sd1 <<< (places - 6'd1))) >>> places;
  assign y = shifted > 64'(HIGH) ? 32'(HIGH) : shifted < 64'(LOW) ? 32'(LOW) : 32'(shifted);
endmodule

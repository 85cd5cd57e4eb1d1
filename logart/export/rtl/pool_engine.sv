// Maximum or average over windows, one element a clock. The average is the sum times a constant, by shifts and adds.
module pool_engine #(
    parameter int CHANNELS = 1,
    parameter int H_IN = 1,
    parameter int W_IN = 1,
    parameter int H_OUT = 1,
    parameter int W_OUT = 1,
    parameter int KH = 1,
    parameter int KW = 1,
    parameter int STRIDE_Y = 1,
    parameter int STRIDE_X = 1,
    parameter int PAD_TOP = 0,
    parameter int PAD_LEFT = 0,
    parameter bit MAXIMUM = 0,
    parameter int FILL = 0,  // what padding is in a maximum
    parameter int FACTOR = 1,  // 1 / count, over 2^n; n is in RIGHT
    parameter int RIGHT = 0,
    parameter int LOW = 0,
    parameter int HIGH = 255
) (
    input logic clk,
    input logic start,
    output logic [31:0] x_address,
    input logic signed [31:0] x_data,
    output logic y_valid,
    output logic [31:0] y_address,
    output logic signed [31:0] y_data,
    output logic done
);
  int c, oy, ox, ky, kx;
  logic busy, window_done;
  int iy, ix;
  logic in_image, first;
  always_comb begin
    iy = oy * STRIDE_Y + ky - PAD_TOP;
    ix = ox * STRIDE_X + kx - PAD_LEFT;
    in_image = iy >= 0 && iy < H_IN && ix >= 0 && ix < W_IN;
    first = ky == 0 && kx == 0;
    x_address = in_image ? (c * H_IN + iy) * W_IN + ix : 0;
  end

  logic signed [63:0] x, gathered, shifted;
  assign x = in_image ? 64'(x_data) : (MAXIMUM ? 64'(FILL) : 64'sd0);
  for (genvar b = 0; b < 31; b++) begin : g_bit
    logic signed [63:0] term, so_far;
    assign term = FACTOR[b] ? gathered <<< b : '0;
    if (b == 0) begin : g_first
      assign so_far = term;
    end else begin : g_next
      assign so_far = g_bit[b-1].so_far + term;
    end
  end
  if (MAXIMUM) begin : g_maximum
    assign shifted = gathered;
  end else if (RIGHT > 0) begin : g_right
    assign shifted = (g_bit[30].so_far + (64'sd1 <<< (RIGHT - 1))) >>> RIGHT;
  end else begin : g_left
    assign shifted = g_bit[30].so_far <<< -RIGHT;
  end
  assign y_data = shifted > 64'(HIGH) ? 32'(HIGH) : shifted < 64'(LOW) ? 32'(LOW) : 32'(shifted);
  assign y_valid = busy && window_done;
  assign y_address = (c * H_OUT + oy) * W_OUT + ox;

  initial begin
    busy = 1'b0;
    done = 1'b0;
    window_done = 1'b0;
    gathered = '0;
    {c, oy, ox, ky, kx} = '0;
  end
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (start) begin
      busy <= 1'b1;
      window_done <= 1'b0;
      {c, oy, ox, ky, kx} <= '0;
    end else if (busy && window_done) begin
      window_done <= 1'b0;
      {ky, kx} <= '0;
      if (ox + 1 < W_OUT) ox <= ox + 1;
      else begin
        ox <= 0;
        if (oy + 1 < H_OUT) oy <= oy + 1;
        else begin
          oy <= 0;
          if (c + 1 < CHANNELS) c <= c + 1;
          else begin
            busy <= 1'b0;
            done <= 1'b1;
          end
        end
      end
    end else if (busy) begin
      if (first) gathered <= x;
      else if (MAXIMUM) gathered <= x > gathered ? x : gathered;
      else gathered <= gathered + x;
      if (kx + 1 < KW) kx <= kx + 1;
      else begin
        kx <= 0;
        if (ky + 1 < KH) ky <= ky + 1;
        else window_done <= 1'b1;
      end
    end
  end
endmodule

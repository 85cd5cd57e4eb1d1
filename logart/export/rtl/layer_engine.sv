// A convolution or linear layer (a convolution of a 1×1 image), one weight a clock: simple rather than fast.
module layer_engine #(
    parameter int C_IN = 1,
    parameter int H_IN = 1,
    parameter int W_IN = 1,
    parameter int C_OUT = 1,
    parameter int H_OUT = 1,
    parameter int W_OUT = 1,
    parameter int KH = 1,
    parameter int KW = 1,
    parameter int STRIDE_Y = 1,
    parameter int STRIDE_X = 1,
    parameter int PAD_TOP = 0,
    parameter int PAD_LEFT = 0,
    parameter int DILATION_Y = 1,
    parameter int DILATION_X = 1,
    parameter int GROUPS = 1,
    parameter int CODEBOOKS = 1,
    parameter int CODE_BITS = 4,
    parameter int TERMS = 2,
    parameter int EXP_BITS = 12,
    parameter int X_BITS = 9,
    parameter int ACC_BITS = 32,
    parameter int FACTOR_BITS = 8,
    parameter int SHIFT_BITS = 12,
    parameter int LOW = 0,
    parameter int HIGH = 255,
    parameter FOLDER = "."
) (
    input logic clk,
    input logic start,
    output logic [31:0] x_address,
    input logic signed [X_BITS-1:0] x_data,
    output logic y_valid,
    output logic [31:0] y_address,
    output logic signed [31:0] y_data,
    output logic done
);
  localparam int C_GROUP = C_IN / GROUPS;
  localparam int K = C_GROUP * KH * KW;

  logic [CODE_BITS-1:0] codes[0:C_OUT*K-1];
  logic [TERMS*(EXP_BITS+2)-1:0] levels[0:CODEBOOKS*(1<<CODE_BITS)-1];
  logic signed [EXP_BITS-1:0] units[0:C_OUT-1];
  logic [FACTOR_BITS-1:0] factors[0:C_OUT-1];
  logic signed [ACC_BITS-1:0] biases[0:C_OUT-1];
  logic signed [SHIFT_BITS-1:0] shifts[0:C_OUT-1];
  initial begin
    $readmemh({FOLDER, "/codes.hex"}, codes);
    $readmemh({FOLDER, "/levels.hex"}, levels);
    $readmemh({FOLDER, "/unit.hex"}, units);
    $readmemh({FOLDER, "/factor.hex"}, factors);
    $readmemh({FOLDER, "/bias.hex"}, biases);
    $readmemh({FOLDER, "/requantize.hex"}, shifts);
  end

  // where the work is: output channel and position, and the weight of the window
  int c, oy, ox, ci, ky, kx, k;
  logic busy, window_done;
  int iy, ix;
  logic in_image;
  always_comb begin
    iy = oy * STRIDE_Y + ky * DILATION_Y - PAD_TOP;
    ix = ox * STRIDE_X + kx * DILATION_X - PAD_LEFT;
    in_image = iy >= 0 && iy < H_IN && ix >= 0 && ix < W_IN;
    x_address = in_image ? ((c / (C_OUT / GROUPS)) * C_GROUP + ci) * H_IN * W_IN + iy * W_IN + ix : 0;
  end

  logic signed [ACC_BITS-1:0] sum;
  processing_element #(
      .X_BITS(X_BITS), .ACC_BITS(ACC_BITS), .TERMS(TERMS), .EXP_BITS(EXP_BITS)
  ) element (
      .clk(clk),
      .clear(k == 0),
      .valid(busy && !window_done),
      .x(in_image ? x_data : '0),
      .weight(levels[(c / (C_OUT / CODEBOOKS)) * (1 << CODE_BITS) + 32'(codes[c*K+k])]),
      .exponent_unit(units[c]),
      .sum(sum)
  );

  requantizer #(
      .ACC_BITS(ACC_BITS), .FACTOR_BITS(FACTOR_BITS), .SHIFT_BITS(SHIFT_BITS), .LOW(LOW), .HIGH(HIGH)
  ) finish (
      .sum(sum), .factor(factors[c]), .bias(biases[c]), .right(shifts[c]), .y(y_data)
  );
  assign y_valid = busy && window_done;
  assign y_address = (c * H_OUT + oy) * W_OUT + ox;

  initial begin
    busy = 1'b0;
    done = 1'b0;
    window_done = 1'b0;
    {c, oy, ox, ci, ky, kx, k} = '0;
  end
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (start) begin
      busy <= 1'b1;
      window_done <= 1'b0;
      {c, oy, ox, ci, ky, kx, k} <= '0;
    end else if (busy && window_done) begin  // the output is written in this clock; on to the next window
      window_done <= 1'b0;
      {ci, ky, kx, k} <= '0;
      if (ox + 1 < W_OUT) ox <= ox + 1;
      else begin
        ox <= 0;
        if (oy + 1 < H_OUT) oy <= oy + 1;
        else begin
          oy <= 0;
          if (c + 1 < C_OUT) c <= c + 1;
          else begin
            busy <= 1'b0;
            done <= 1'b1;
          end
        end
      end
    end else if (busy) begin  // on to the next weight
      if (k + 1 == K) window_done <= 1'b1;
      else k <= k + 1;
      if (kx + 1 < KW) kx <= kx + 1;
      else begin
        kx <= 0;
        if (ky + 1 < KH) ky <= ky + 1;
        else begin
          ky <= 0;
          ci <= ci + 1;
        end
      end
    end
  end
endmodule

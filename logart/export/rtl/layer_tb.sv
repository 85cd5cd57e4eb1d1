// Runs one layer on its golden inputs and compares every output. `params.svh` is the layer's.
`timescale 1ns / 1ps
module layer_tb;
  `include "params.svh"
  localparam int INPUTS = C_IN * H_IN * W_IN;
  localparam int OUTPUTS = C_OUT * H_OUT * W_OUT;

  logic signed [31:0] x[0:IMAGES*INPUTS-1];
  logic signed [31:0] expected[0:IMAGES*OUTPUTS-1];
  logic clk = 0, start = 0;
  logic y_valid, done;
  logic [31:0] x_address, y_address;
  logic signed [31:0] y_data;
  int image = 0, wrong = 0, seen = 0;

  layer_engine #(
      .C_IN(C_IN), .H_IN(H_IN), .W_IN(W_IN), .C_OUT(C_OUT), .H_OUT(H_OUT), .W_OUT(W_OUT), .KH(KH), .KW(KW),
      .STRIDE_Y(STRIDE_Y), .STRIDE_X(STRIDE_X), .PAD_TOP(PAD_TOP), .PAD_LEFT(PAD_LEFT), .DILATION_Y(DILATION_Y),
      .DILATION_X(DILATION_X), .GROUPS(GROUPS), .CODEBOOKS(CODEBOOKS), .CODE_BITS(CODE_BITS), .TERMS(TERMS),
      .X_BITS(X_BITS), .LOW(LOW), .HIGH(HIGH), .FOLDER(FOLDER)
  ) engine (
      .clk(clk), .start(start), .x_address(x_address), .x_data(X_BITS'(x[image*INPUTS+x_address])),
      .y_valid(y_valid), .y_address(y_address), .y_data(y_data), .done(done)
  );

  always #1 clk = ~clk;
  always @(posedge clk)
    if (y_valid) begin
      seen <= seen + 1;
      if (y_data !== expected[image*OUTPUTS+y_address]) wrong <= wrong + 1;
    end

  initial begin
    $readmemh(INPUT, x);
    $readmemh(OUTPUT, expected);
    for (image = 0; image < IMAGES; image = image + 1) begin
      @(negedge clk) start = 1;
      @(negedge clk) start = 0;
      @(posedge done);
      @(negedge clk);
    end
    $display("%s: %0d mismatches of %0d", NAME, wrong + (seen != IMAGES * OUTPUTS), IMAGES * OUTPUTS);
    $finish;
  end
endmodule

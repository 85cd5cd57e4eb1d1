// What the processing elements are compared with: a multiply-accumulate on a linear grid of signed W_BITS-bit weights.
module linear_mac #(
    parameter int X_BITS = 9,     // of an activation, signed
    parameter int W_BITS = 4,     // of a weight, signed
    parameter int ACC_BITS = 32   // of the accumulator
) (
    input logic clk,
    input logic clear,  // with valid: the sum starts anew from this product
    input logic valid,
    input logic signed [X_BITS-1:0] x,
    input logic signed [W_BITS-1:0] weight,
    output logic signed [ACC_BITS-1:0] sum
);
  logic signed [X_BITS+W_BITS-1:0] product;
  assign product = x * weight;
  always_ff @(posedge clk) begin
    if (valid) sum <= (clear ? '0 : sum) + ACC_BITS'(product);
  end
endmodule

// A processing element for grids of powers of 2 and √2 alone: x · √2 is made once, by constant shifts and TERMS - 1 adds, and
// one shifter serves both kinds of levels, where the export's element has a shifter for each term of any sum of powers.
module root2_element #(
    parameter int X_BITS = 9,      // of an activation, signed
    parameter int ACC_BITS = 32,   // of the accumulator
    parameter int TERMS = 2,       // √2 ≈ 1 + 1/2 (2), - 1/16 (3), - 1/64 (4)
    parameter int PLACE_BITS = 3   // of a shift, unsigned
) (
    input logic clk,
    input logic clear,  // with valid: the sum starts anew from this product
    input logic valid,
    input logic signed [X_BITS-1:0] x,
    input logic [PLACE_BITS+1:0] weight,  // {negative, odd half-step, places}
    output logic signed [ACC_BITS-1:0] sum  // in units of 2^-FRACTION
);
  localparam int FRACTION = TERMS == 2 ? 1 : TERMS == 3 ? 4 : 6;  // bits that √2 has behind the point
  localparam int FACTOR_BITS = X_BITS + FRACTION + 1;
  localparam int BITS = FACTOR_BITS + (1 << PLACE_BITS) - 1;
  logic signed [FACTOR_BITS-1:0] even, odd, factor;
  assign even = FACTOR_BITS'(x) <<< FRACTION;
  if (TERMS == 2) assign odd = even + (even >>> 1);
  else if (TERMS == 3) assign odd = even + (even >>> 1) - (even >>> 4);
  else assign odd = even + (even >>> 1) - (even >>> 4) - (even >>> 6);
  assign factor = weight[PLACE_BITS] ? odd : even;

  logic signed [BITS-1:0] product;
  assign product = BITS'(factor) <<< weight[PLACE_BITS-1:0];
  logic signed [ACC_BITS-1:0] signed_product;  // the one's complement; the carry of the sum makes it two's
  assign signed_product = ACC_BITS'(product) ^ {ACC_BITS{weight[PLACE_BITS+1]}};
  always_ff @(posedge clk) begin
    if (valid) sum <= (clear ? '0 : sum) + signed_product + ACC_BITS'(weight[PLACE_BITS+1]);
  end
endmodule

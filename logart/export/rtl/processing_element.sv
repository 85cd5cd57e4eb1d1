// Multiply-accumulate on a logarithmic codebook, without a multiplier: the weight is at most TERMS signed powers of two, so a
// product is TERMS shifted copies of the activation, added or subtracted. One weight a clock.
module processing_element #(
    parameter int X_BITS = 9,     // of an activation, signed
    parameter int ACC_BITS = 32,  // of the accumulator
    parameter int TERMS = 2,      // powers of two a weight has at most
    parameter int EXP_BITS = 12   // of an exponent, signed
) (
    input logic clk,
    input logic clear,  // with valid: the sum starts anew from this product
    input logic valid,
    input logic signed [X_BITS-1:0] x,
    // per term, the first in the lowest bits: {used, negative, exponent}
    input logic [TERMS*(EXP_BITS+2)-1:0] weight,
    input logic signed [EXP_BITS-1:0] exponent_unit,  // of the channel; a term below it is none
    output logic signed [ACC_BITS-1:0] sum
);
  logic signed [ACC_BITS-1:0] wide;
  assign wide = {{(ACC_BITS - X_BITS) {x[X_BITS-1]}}, x};

  for (genvar t = 0; t < TERMS; t++) begin : g_term
    localparam int AT = t * (EXP_BITS + 2);
    logic signed [EXP_BITS:0] place;
    logic signed [ACC_BITS-1:0] shifted;
    logic used, negative;
    assign place = $signed(weight[AT+:EXP_BITS]) - exponent_unit;
    assign negative = weight[AT+EXP_BITS];
    assign used = weight[AT+EXP_BITS+1] && !place[EXP_BITS];
    assign shifted = wide <<< place[5:0];
    logic signed [ACC_BITS-1:0] term, so_far;
    assign term = !used ? '0 : negative ? -shifted : shifted;
    if (t == 0) begin : g_first
      assign so_far = term;
    end else begin : g_next
      assign so_far = g_term[t-1].so_far + term;
    end
  end

  always_ff @(posedge clk) begin
    if (valid) sum <= clear ? g_term[TERMS-1].so_far : sum + g_term[TERMS-1].so_far;
  end
endmodule

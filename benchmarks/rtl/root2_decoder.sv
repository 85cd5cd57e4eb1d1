// From a code of the dynamic grid to the word that `root2_element` reads. Combinational.
// Codes count levels in order, so the top bit says positive, and the rest, inverted where negative, is the magnitude's index m
// from the smallest. In half-steps above the channel's unit it is 2m where m < n_base2, else m + offset: the channel has two numbers.
// With h the half-step of the smallest √2-spaced level, offset is n_base2 - 1 where h is odd and n_base2 where it is even; without
// base-2 levels it is 1 where h is odd and 0 where it is even.
module root2_decoder #(
    parameter int N_BITS = 4
) (
    input logic [N_BITS-1:0] code,
    input logic [N_BITS-1:0] n_base2,  // of the channel, 0 to 2^(N_BITS-1)
    input logic [N_BITS-1:0] offset,   // of the channel, above
    output logic [N_BITS:0] weight     // {negative, odd half-step, places}
);
  logic negative;
  logic [N_BITS-2:0] index;
  logic [N_BITS-1:0] half_steps;
  assign negative = !code[N_BITS-1];
  assign index = code[N_BITS-2:0] ^ {(N_BITS - 1) {negative}};
  assign half_steps = {1'b0, index} < n_base2 ? {index, 1'b0} : {1'b0, index} + offset;
  assign weight = {negative, half_steps[0], half_steps[N_BITS-1:1]};
endmodule

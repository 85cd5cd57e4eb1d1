// Requantizes and moves values, one a clock: residual sums, ReLU, padding, slices, concatenation, flattening.
// y[TO + i] = saturate((a[map_a[i]] << ALIGN_A) + (b[map_b[i]] << ALIGN_B)) >> RIGHT, to nearest, ties up); an address of -1 is zero.
module move_engine #(
    parameter int COUNT = 1,
    parameter int TO = 0,
    parameter int ALIGN_A = 0,
    parameter int ALIGN_B = 0,
    parameter int RIGHT = 0,
    parameter int LOW = 0,
    parameter int HIGH = 255,
    parameter MAP_A = "",
    parameter MAP_B = ""  // empty: there is no b
) (
    input logic clk,
    input logic start,
    output logic [31:0] a_address,
    input logic signed [31:0] a_data,
    output logic [31:0] b_address,
    input logic signed [31:0] b_data,
    output logic y_valid,
    output logic [31:0] y_address,
    output logic signed [31:0] y_data,
    output logic done
);
  logic signed [31:0] map_a[0:COUNT-1];
  logic signed [31:0] map_b[0:COUNT-1];
  integer j;
  initial begin
    for (j = 0; j < COUNT; j = j + 1) map_b[j] = -1;
    $readmemh(MAP_A, map_a);
    if (MAP_B != "") $readmemh(MAP_B, map_b);
  end

  int i;
  logic busy;
  assign a_address = map_a[i] < 0 ? 0 : map_a[i];
  assign b_address = map_b[i] < 0 ? 0 : map_b[i];
  logic signed [47:0] a, b, total, shifted;
  assign a = map_a[i] < 0 ? 48'sd0 : 48'(a_data) <<< ALIGN_A;
  assign b = map_b[i] < 0 ? 48'sd0 : 48'(b_data) <<< ALIGN_B;
  assign total = a + b;
  if (RIGHT > 0) begin : g_right
    assign shifted = (total + (48'sd1 <<< (RIGHT - 1))) >>> RIGHT;
  end else begin : g_left
    assign shifted = total <<< -RIGHT;
  end
  assign y_data = shifted > 48'(HIGH) ? 32'(HIGH) : shifted < 48'(LOW) ? 32'(LOW) : 32'(shifted);
  assign y_valid = busy;
  assign y_address = TO + i;

  initial begin
    busy = 1'b0;
    done = 1'b0;
    i = 0;
  end
  always_ff @(posedge clk) begin
    done <= 1'b0;
    if (start) begin
      busy <= 1'b1;
      i <= 0;
    end else if (busy) begin
      if (i + 1 < COUNT) i <= i + 1;
      else begin
        busy <= 1'b0;
        done <= 1'b1;
        i <= 0;
      end
    end
  end
endmodule

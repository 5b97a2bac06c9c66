/*
 * Multiply-accumulate of $levels.
 *
 * At a rising edge of the clock with enable: sum <= (first ? 0 : sum) + weight x. $encoding
 */
module $name #(
    parameter X_BITS = $x_bits, // of an input
    parameter X_SIGNED = $x_signed, // whether it is of two's complement
    parameter SUM_BITS = $sum_bits // of two's complement
) (
    input wire clock,
    input wire enable,
    input wire first,
    input wire [$w_top:0] weight,
    input wire [X_BITS-1:0] x,
    output reg signed [SUM_BITS-1:0] sum
);
    localparam P_BITS = X_BITS + $grown; // of a product, its sign included
    wire signed [X_BITS:0] extended = {X_SIGNED ? x[X_BITS-1] : 1'b0, x};
    wire signed [P_BITS-1:0] value = extended;
    wire signed [SUM_BITS-1:0] before = first ? {SUM_BITS{1'b0}} : sum;
$product
endmodule

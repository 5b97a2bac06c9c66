/*
 * Sums of a network, term by term: a line of ${name}_terms.hex is whether the term is its sum's last, the weight's code
 * and the input; one of ${name}_sums.hex a sum.
 */
`timescale 1ns / 1ns

module ${name}_tb;
    reg [$term_top:0] terms [0:$last_term];
    reg signed [$sum_top:0] sums [0:$last_sum];
    reg clock = 0, first = 1, last;
    reg [$w_top:0] weight;
    reg [$x_top:0] x;
    wire signed [$sum_top:0] sum;
    integer i, done = 0, wrong = 0;

    $name dut (.clock(clock), .enable(1'b1), .first(first), .weight(weight), .x(x), .sum(sum));

    initial begin
        $$readmemh("${name}_terms.hex", terms);
        $$readmemh("${name}_sums.hex", sums);
        for (i = 0; i <= $last_term; i = i + 1) begin
            {last, weight, x} = terms[i];
            #5 clock = 1;
            #5 clock = 0;
            first = last;
            if (last) begin
                if (sum !== sums[done]) begin
                    wrong = wrong + 1;
                    $$display("sum %0d: %0d instead of %0d", done, sum, sums[done]);
                end
                done = done + 1;
            end
        end
        $$display("%0d sums of %0d terms, %0d wrong", done, i, wrong);
        $$finish;
    end
endmodule

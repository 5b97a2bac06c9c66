/*
 * The functions that a program in C is made of, as templates of Python's string.Template: ${x} and ${y} are the types of
 * input and output, ${t} that of thresholds or of a second input. c.py writes those that a program calls, in this order.
 */

/* kernel: clipped */
static int32_t clipped(int64_t x, int32_t low, int32_t high)
{
    return x < low ? low : x > high ? high : (int32_t)x;
}

/* kernel: weights */
/* weights of a few bits each, read one after the other */
struct reader {
    const uint8_t *next;
    uint32_t held;
    uint8_t count;
};

static uint16_t next_code(struct reader *reader, uint8_t bits)
{
    uint16_t code;
    while (reader->count < bits) {
        reader->held |= (uint32_t)*reader->next++ << reader->count;
        reader->count = (uint8_t)(reader->count + 8);
    }
    code = (uint16_t)(reader->held & ((1u << bits) - 1));
    reader->held >>= bits;
    reader->count = (uint8_t)(reader->count - bits);
    return code;
}

$weight

struct convolution {
    const struct weight *levels; /* of each code */
    uint8_t bits;                /* of a code */
    uint16_t inputs;             /* channels of a group */
    int32_t height, width, plane;
    int32_t kernel_height, kernel_width;
    int32_t stride_down, stride_right;
    int32_t rows_down;         /* stride_down input rows, in values */
    int32_t top, left, first;  /* input row, column and row's value under the first weight: 0 or negative */
    int32_t next_row, next_values, next_column; /* between two weights: rows, the same in values, columns */
    int32_t out_height, out_width;
    int32_t last;              /* from the first to the last output, in input columns */
    int32_t pitched;           /* values of an input channel with zeros between its rows, where it is summed in runs */
};

/* kernel: add */
/* one weight's share of all sums of an output channel */
static void ${name}_${x}_${y}(${y}_t *restrict sums, const ${x}_t *restrict x, const struct convolution *c, int32_t row,
                   int32_t column, int32_t at, $argument)
{
    int32_t start = 0, end = c->out_width, last = column + c->last, i, j, k;
    while (column < 0 && start < end) {
        column += c->stride_right;
        at += c->stride_right;
        start++;
    }
    while (last >= c->width && start < end) {
        last -= c->stride_right;
        end--;
    }
    for (i = 0; i < c->out_height; i++, row += c->stride_down, at += c->rows_down, sums += c->out_width) {
        if (row < 0 || row >= c->height)
            continue;
        if (c->stride_right == 1)
            for (j = start, k = at; j < end; j++, k++)
                sums[j] = (${y}_t)(sums[j] $term);
        else
            for (j = start, k = at; j < end; j++, k += c->stride_right)
                sums[j] = (${y}_t)(sums[j] $term);
    }
}

/* kernel: sums */
/* all sums of an output channel */
static void sums_${x}_${y}(${y}_t *sums, const ${x}_t *x, const struct convolution *c, int32_t count,
                 struct reader *weights)
{
    int32_t i, row, column;
    for (i = 0; i < count; i++)
        sums[i] = 0;
    for (i = 0; i < c->inputs; i++, x += c->plane) {
        int32_t top = c->top, first = c->first;
        for (row = 0; row < c->kernel_height; row++, top += c->next_row, first += c->next_values) {
            int32_t left = c->left;
            for (column = 0; column < c->kernel_width; column++, left += c->next_column) {
                struct weight w = c->levels[next_code(weights, c->bits)];
$apply
            }
        }
    }
}

/* kernel: run */
/* one weight's share of all sums, in one run: y 2^shift of count values */
static void ${name}_run_${x}_${y}(${y}_t *restrict sums, const ${x}_t *restrict x, int32_t count, $argument)
{
    int32_t j;
    for (j = 0; j < count; j++)
        sums[j] = (${y}_t)(sums[j] $term);
}

/* kernel: surround */
/* the rows of an input channel with zeros between them */
static void surround_${x}(${x}_t *restrict padded, const ${x}_t *restrict x, int32_t height, int32_t width, int32_t gap)
{
    int32_t row, j;
    for (row = 0; row < height; row++, x += width, padded += width + gap) {
        for (j = 0; j < width; j++)
            padded[j] = x[j];
        for (j = width; j < width + gap; j++)
            padded[j] = 0;
    }
}

/* kernel: runs */
/*
 * All sums of an output channel that is as large as its input, if every position counts. With zeros between the rows
 * of the input each weight meets one run of values; the sums between the rows are of no use, and left out at the end.
 */
static void runs_${x}_${y}(${y}_t *sums, ${x}_t *padded, const ${x}_t *x, const struct convolution *c,
                 struct reader *weights)
{
    int32_t i, j, row, column, gap = -c->left, plane = c->pitched;
    ${y}_t *sum = sums;
    for (i = 0; i < plane; i++)
        sums[i] = 0;
    for (i = 0; i < gap; i++)
        padded[i] = padded[gap + plane + i] = 0;
    for (i = 0; i < c->inputs; i++, x += c->plane) {
        int32_t first = c->first;
        const ${x}_t *values = x;
        if (gap) {
            surround_${x}(padded + gap, x, c->height, c->width, gap);
            values = padded;
        }
        for (row = 0; row < c->kernel_height; row++, first += c->next_values) {
            int32_t left = 0, above = first < 0 ? -first : 0, below = first > 0 ? first : 0;
            int32_t count = plane - above - below;
            for (column = 0; column < c->kernel_width; column++, left += c->next_column) {
                struct weight w = c->levels[next_code(weights, c->bits)];
                ${y}_t *to = sums + above;
                const ${x}_t *from = values + below + left;
                if (count <= 0)
                    continue;
$apply
            }
        }
    }
    for (row = 0, i = 0; row < c->height; row++, i += gap)
        for (j = 0; j < c->width; j++)
            *sum++ = sums[i++];
}

/* kernel: levels */
/* the level whose number is how many thresholds a value passes */
static void levels_${x}_${t}_${y}(${y}_t *y, const ${x}_t *x, int32_t count, const ${t}_t *thresholds, uint16_t number,
                   uint8_t falls, const ${y}_t *levels)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        int32_t value = falls ? -(int32_t)x[i] : (int32_t)x[i];
        uint16_t low = 0, high = number;
        while (low < high) {
            uint16_t middle = (uint16_t)((low + high) >> 1);
            if (thresholds[middle] <= value)
                low = (uint16_t)(middle + 1);
            else
                high = middle;
        }
        y[i] = levels[low];
    }
}

/* kernel: times_multiply */
static int64_t times(int32_t x, int32_t factor)
{
    return (int64_t)x * factor;
}

/* kernel: times_shift */
/* x factor, by shifts and adds */
static int64_t times(int32_t x, int32_t factor)
{
    int64_t product = 0;
    uint32_t bits = factor < 0 ? -(uint32_t)factor : (uint32_t)factor;
    uint64_t magnitude = x < 0 ? -(uint64_t)(int64_t)x : (uint64_t)x;
    for (; bits; bits >>= 1, magnitude <<= 1)
        if (bits & 1)
            product += (int64_t)magnitude;
    return (x < 0) == (factor < 0) ? product : -product;
}

/* kernel: rescale */
/* (factor x + addend) 2^-shift, rounded down and clipped */
static void rescale_${x}_${y}(${y}_t *y, const ${x}_t *x, int32_t count, int32_t factor, int64_t addend, uint8_t shift,
                    int32_t low, int32_t high)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        int64_t value = times(x[i], factor) + addend;
        y[i] = (${y}_t)clipped(value < 0 ? ~(~value >> shift) : value >> shift, low, high);
    }
}

/* kernel: look_up */
static void look_up_${y}(${y}_t *y, const uint8_t *x, int32_t count, const ${y}_t *table)
{
    int32_t i;
    for (i = 0; i < count; i++)
        y[i] = table[x[i]];
}

/* kernel: plus */
static void plus_${x}_${t}_${y}(${y}_t *y, const ${x}_t *first, const ${t}_t *second, int32_t count, int32_t low, int32_t high)
{
    int32_t i;
    for (i = 0; i < count; i++)
        y[i] = (${y}_t)clipped((int64_t)first[i] + second[i], low, high);
}

/* kernel: window */
struct window {
    int32_t channels, height, width, plane;
    int32_t kernel_height, kernel_width, stride_down, stride_right;
    int32_t rows_down;        /* stride_down input rows, in values */
    int32_t top, left, first; /* input row, column and value under the first window: 0 or negative */
    int32_t out_height, out_width;
};

/* kernel: pool */
static void ${kind}_${x}_${y}(${y}_t *y, const ${x}_t *x, const struct window *w)
{
    int32_t channel, i, j, row, column;
    for (channel = 0; channel < w->channels; channel++, x += w->plane) {
        int32_t top = w->top, first = w->first;
        for (i = 0; i < w->out_height; i++, top += w->stride_down, first += w->rows_down) {
            int32_t left = w->left, corner = first + w->left;
            for (j = 0; j < w->out_width; j++, left += w->stride_right, corner += w->stride_right) {
                int32_t result = $nothing, at = corner;
                for (row = top; row < top + w->kernel_height; row++, at += w->width)
                    for (column = 0; column < w->kernel_width; column++)
                        if (row >= 0 && row < w->height && left + column >= 0 && left + column < w->width) {
                            int32_t value = x[at + column];
                            $take
                        }
                *y++ = (${y}_t)result;
            }
        }
    }
}

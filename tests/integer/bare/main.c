/*
 * The images that lie in the program, and their logits on the machine's output: eight hexadecimal digits each, a line
 * an image. start_*.c has the machine's entry, put() and leave().
 */

#include "net.h"

extern const uint8_t images[], images_end[];
void put(const char *text);
void leave(void);

int main(void)
{
    static int32_t logits[NET_CLASSES];
    static char text[] = "12345678 ";
    const uint8_t *image;
    int i, digit;
    for (image = images; image != images_end; image += NET_CHANNELS * NET_HEIGHT * NET_WIDTH) {
        net_run(image, logits);
        for (i = 0; i < NET_CLASSES; i++) {
            uint32_t left = (uint32_t)logits[i];
            for (digit = 7; digit >= 0; digit--, left >>= 4)
                text[digit] = "0123456789abcdef"[left & 15];
            put(text);
        }
        put("\n");
    }
    leave();
    return 0;
}

/* the reset of a Cortex-M0, whose output a debugger takes: semihosting */

#include <stdint.h>

extern uint32_t data_in_flash[], data_start[], data_end[], bss_start[], bss_end[], stack_top[];
int main(void);

static void call(uint32_t number, uint32_t argument)
{
    register uint32_t r0 __asm__("r0") = number;
    register uint32_t r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

void put(const char *text)
{
    call(0x04, (uint32_t)text); /* SYS_WRITE0 */
}

void leave(void)
{
    call(0x18, 0x20026); /* SYS_EXIT of an application that is done */
}

static void reset(void)
{
    uint32_t *to, *from = data_in_flash;
    for (to = data_start; to != data_end;)
        *to++ = *from++;
    for (to = bss_start; to != bss_end;)
        *to++ = 0;
    main();
}

static void fault(void)
{
    put("fault\n");
    call(0x18, 0x20023); /* SYS_EXIT of one that failed */
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {stack_top, reset, fault, fault};

/* what lies in images.bin */
    .section .images, "a"
    .globl images
images:
    .incbin "images.bin"
    .globl images_end
images_end:

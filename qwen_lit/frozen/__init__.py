"""Where the frozen weights of decoder layers live: on the device, in host memory, or on disk, a block a layer."""

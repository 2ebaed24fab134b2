// The kernels by op code. Included last inside a level's namespace.

extern const Kernel kernels[QR_OPS] = {nop,    linear, rms_norm,  layer_norm, activation, gather,
                                       sample, heads,  attention, argmax,     linear_q, add_op};

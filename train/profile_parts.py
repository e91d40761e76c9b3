"""What the time of a step is told by: names in files, and in words."""

PARTS = {
    "attention": "attention",  # blocks, their merging, and what is computed around them
    "ring": "exposed ring",  # exchanges of attention, Ulysses' too, that nothing is computed beside
    "mlp": "MLP and projections",  # all of a layer but its attention
    "loss": "loss",  # with the vocabulary projection
    "gradients": "gradients and ZeRO",  # what backward does besides: sums over ranks; gathering ZeRO-3's weights
    "optimizer": "optimizer",  # clipping and update
    "data": "data",  # waiting for the batch
    "idle": "idle",  # of the device: it waits until the host has launched something
    "other": "other",  # embedding, last norm, counting labels; on a CPU all that is in no range
}

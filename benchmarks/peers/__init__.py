"""The networks of `benchmarks.engine` as one would train them without kvision: four files, one promise.

Each file has a function

    train(network, images, labels, batch_size, clock, *, steps, dtype="float32", weights=None) -> int

that trains "resnet20", "vgg_small" or "resnet50" for so many steps and returns how many trainable parameters the
network has. Images are float32 (n, h, w, 3), labels int32 (n,), n a multiple of `batch_size`, and batches are taken in
their order, from the first again when all were. On an accelerator they are all put into its memory before training.
`dtype` "bfloat16" is what layers compute in; variables and the loss stay float32. `clock.start()` is called before the
first step, `clock.step(loss)` after each. `weights`, for tests, are initial values in Keras's layouts by the names of
kvision's variables, in the order in which the network uses them.

A file here is never named like a package: one called `flax.py` could be imported in Flax's place.
"""

# At ResNet-20's rate the loss of ResNet-50's few images leaps up and down.
LEARNING_RATES = {"resnet20": 0.01, "vgg_small": 0.01, "resnet50": 0.001}
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # of kernels; biases and batch norms are left alone

CLASSES = {"resnet20": 10, "vgg_small": 10, "resnet50": 1000}
# kvision.models.vgg: 86 million multiply-adds an image. No dropout: each framework has its own masks.
VGG = {"convolutions": (1, 1, 2, 2, 2), "width": 48, "hidden": 256}
# kvision.models.resnet, torchvision's architecture. Tests make it shallow and narrow.
RESNET50 = {"blocks": (3, 4, 6, 3), "width": 64}

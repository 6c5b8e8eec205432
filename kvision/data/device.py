"""Training images in the device's memory: cropped, flipped and scaled there.

The host sends a step six integers per image (`kvision.data.batches.PARAMS`) instead of float pixels. The images are
those of `Batches.epoch` up to the rounding of the scaling.
"""

from keras import ops

from kvision.data.batches import PARAMS, Batches

MAX_PIXELS = 2**31  # pixels are indexed by int32


class DeviceDataset:
    """The images and labels of `batches` on the device.

    Attributes:
        count, padding: number of images, and pixels added to each side of them.
        batches: the source.
        tensors: arguments for a compiled step that calls `make_batch`: pixels, uint8 (n * h * w, c) with the padding
            of the augmentation; labels, int32 (n,); and the scaling's factor and offset, float32 (c,).

    Raises:
        ValueError: more pixels than int32 can index.
    """

    def __init__(self, batches: Batches):
        self.batches, padded = batches, batches.padded
        if padded.size // padded.shape[-1] >= MAX_PIXELS:
            raise ValueError(
                f"{len(padded):,} padded images of {padded.shape[1]}x{padded.shape[2]} pixels are too many for "
                "device memory: int32 indexes fewer than 2**31 pixels"
            )
        self.height, self.width, self.cutout = batches.height, batches.width, batches.augmentation.cutout
        self.count, self.padding = len(padded), batches.augmentation.crop_padding
        self.rows, self.columns, channels = padded.shape[1:]
        if batches.preprocessing.channel_order == "bgr":
            padded = padded[..., ::-1]
        factor, offset = batches.preprocessing.constants("float32")
        arrays = padded.reshape(-1, channels), batches.labels, factor, offset
        self.tensors = tuple(ops.convert_to_tensor(array) for array in arrays)

    def make_batch(self, tensors: tuple, params) -> dict:
        """Return the batch of a step's `params`, int32 (6, n): "image", preprocessed float32 (n, h, w, c), and "label",
        int32 (n,); a seventh row of params becomes "weight", float32 (n,)."""
        pixels, labels, factor, offset = tensors
        indices, tops, lefts, flips, *corner = (ops.reshape(params[i], (-1, 1)) for i in range(len(PARAMS)))
        rows, columns = ops.arange(self.height, dtype="int32"), ops.arange(self.width, dtype="int32")
        flipped = columns + flips * (self.width - 1 - 2 * columns)
        row = (indices * self.rows + tops + rows)[:, :, None]
        images = ops.cast(ops.take(pixels, row * self.columns + (lefts + flipped)[:, None], axis=0), "float32")
        if self.cutout:
            inside = [
                (axis >= first) & (axis < first + self.cutout)
                for axis, first in zip((rows, columns), corner, strict=True)
            ]
            images = ops.where((inside[0][:, :, None] & inside[1][:, None])[..., None], 0.0, images)
        batch = {"image": images * factor - offset, "label": ops.take(labels, indices[:, 0])}
        return batch | {"weight": ops.cast(params[6], "float32")} if params.shape[0] > len(PARAMS) else batch

"""Training images in the device's memory: what a step shows of them is cut out, mirrored and scaled there.

The host then sends a step six integers an image (`kvision.data.batches.PARAMS`) instead of its pixels as floats. The
integers are drawn as ever, so the images are those of the host's way, but for the rounding of the scaling.
"""

from keras import ops

from kvision.data.batches import Batches

PLACES = 2**31  # of pixels; they are counted by int32


class DeviceDataset:
    """The images and labels of `batches` on the device.

    Attributes:
        count, border: how many images, and the pixels added to each side of them.
        tensors: what `show` reads, to be handed to a compiled step as an argument: pixels, uint8 (n * h * w, c) with
            the border that augmentation needs, labels, int32 (n,), and the scaling's factor and offset, float32 (c,).

    Raises:
        ValueError: more pixels than int32 counts.
    """

    def __init__(self, batches: Batches):
        padded = batches.padded
        if padded.size // padded.shape[-1] >= PLACES:
            raise ValueError(
                f"{len(padded):,} images of {padded.shape[1]}x{padded.shape[2]} pixels with their border are too many "
                "to be kept on the device"
            )
        self.height, self.width, self.cutout = batches.height, batches.width, batches.augmentation.cutout
        self.count, self.border = len(padded), batches.augmentation.crop_padding
        self.rows, self.columns, channels = padded.shape[1:]
        if batches.preprocessing.channel_order == "bgr":
            padded = padded[..., ::-1]
        factor, offset = batches.preprocessing.constants("float32")
        arrays = padded.reshape(-1, channels), batches.labels, factor, offset
        self.tensors = tuple(ops.convert_to_tensor(array) for array in arrays)

    def make_batch(self, tensors: tuple, params):
        """Preprocessed float32 images (n, h, w, c) and int32 labels (n,) of one step's `params`, int32 (6, n)."""
        pixels, labels, factor, offset = tensors
        numbers, tops, lefts, mirrored, *corner = (ops.reshape(params[i], (-1, 1)) for i in range(6))
        rows, columns = ops.arange(self.height, dtype="int32"), ops.arange(self.width, dtype="int32")
        turned = columns + mirrored * (self.width - 1 - 2 * columns)
        row = (numbers * self.rows + tops + rows)[:, :, None]
        images = ops.cast(ops.take(pixels, row * self.columns + (lefts + turned)[:, None], axis=0), "float32")
        if self.cutout:
            inside = [
                (axis >= first) & (axis < first + self.cutout)
                for axis, first in zip((rows, columns), corner, strict=True)
            ]
            images = ops.where((inside[0][:, :, None] & inside[1][:, None])[..., None], 0.0, images)
        return images * factor - offset, ops.take(labels, numbers[:, 0])

"""Classify CIFAR-10: `KERAS_BACKEND=torch python -m apps.cifar10`.

The default network, airbench_small, is sized for two CPU cores: test accuracy 89.7 to 89.9 % (seed 0, one run on each
backend). On two cores of a Xeon with AVX-512 it trains in 400 s on PyTorch; the README lists the other backends. Two
recipes are for a GPU. `--model resnet20` is the recipe of He et al. 2015, 164 epochs: 91.4 % in 159 s (JAX, an H200,
float32, seed 0, one run; the paper reports 91.25 %). `--model airbench94 --dtype bfloat16` is the recipe of Jordan
2024: 94.07 % with test-time augmentation (JAX, ten runs; 94.04 % on PyTorch), in seconds, see docs/engine.md.
"""

import sys

from kvision.config import Config
from kvision.experiment import classify, command

DATASETS = ("cifar10", "shapes10")

# He et al. 2015, section 4.2: weight decay 1e-4 is an L2 penalty of half that.
RESNET = {"epochs": 164, "learning_rate": 0.1, "schedule": "steps", "l2": 5e-5, "flip": True, "crop_padding": 4}
VGG = {"epochs": 60, "learning_rate": 0.05, "warmup": 0.1, "l2": 2.5e-4, "flip": True, "crop_padding": 4, "hidden": 512}

RECIPES = {
    config.model: config
    for config in (
        Config(
            model="airbench_small",
            epochs=12,
            batch_size=250,
            learning_rate=0.29,
            momentum=0.85,
            weight_decay=0.0111,
            schedule="linear",
            warmup=0.23,
            label_smoothing=0.2,
            flip=True,
            crop_padding=2,
            padding_mode="reflect",
            bias_factor=64.0,
            whiten=True,
        ),
        Config(
            model="airbench94",
            epochs=12,
            batch_size=1000,
            learning_rate=1.15,
            momentum=0.85,
            weight_decay=0.0111,
            schedule="linear",
            warmup=0.23,
            label_smoothing=0.2,
            flip=True,
            crop_padding=2,
            padding_mode="reflect",
            bias_factor=64.0,
            whiten=True,
            lookahead=5,
            tta="flip_shift",
        ),
        Config(model="softmax", epochs=10, batch_size=128, learning_rate=0.01, flip=True),
        Config(model="mlp", epochs=30, batch_size=128, learning_rate=0.02, flip=True, crop_padding=2),
        Config(
            model="cifar_cnn", epochs=30, batch_size=128, learning_rate=0.02, warmup=0.05, flip=True, crop_padding=2
        ),
        *(Config(model=f"resnet{depth}", **RESNET) for depth in (20, 32, 44, 56)),
        # "we use 0.01 to warm up the training" of the deepest one.
        Config(model="resnet110", **RESNET | {"warmup": 0.01, "schedule": "cosine"}),
        *(
            Config(
                model=name, epochs=60, learning_rate=0.1, l2=2.5e-4, flip=True, crop_padding=4, padding_mode="reflect"
            )
            for name in ("wide_resnet", "wide_resnet_16_4")
        ),
        *(Config(model=f"vgg{depth}", **VGG) for depth in (11, 13, 16, 19)),
        *(Config(model=f"vgg{depth}_bn", **VGG) for depth in (11, 13, 16, 19)),
    )
}


def main(config: Config = RECIPES["airbench_small"]) -> dict:
    """Train as configured; returns the content of metrics.json and the run folder."""
    return classify(config, DATASETS)


if __name__ == "__main__":
    sys.exit(command(main, RECIPES, __doc__))

"""The terms of Keras, PyTorch and torchvision in American spelling: words of an earlier vocabulary do not come back."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kvision", "apps", "benchmarks", "docs", "tests", "weights")
FILES = sorted(
    path
    for path in [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.suffix in {".py", ".md", ".toml", ".ini"} and path != Path(__file__).resolve()
)

# (pattern, what to write instead)
WORDS = (
    # identifiers
    (r"\b[Ff]loors\b|FLOORS", "engine, BACKENDS"),
    (r"\bPictures\b|\b[Pp]ictures?\b", "DeviceDataset, images"),
    (r"predict_shown|predict_pictures", "predict_on_device"),
    (r"steps_at_once", "steps_per_execution"),
    (r"images_on\b|IMAGES_ON", "data_on"),
    (r"\binnermost\b", "unwrap_optimizer"),
    (r"\bTaps?\b|\btaps\b", "Recorder, layer_outputs, feature layers"),
    (r"take_steps|\bso_far\b|_Average\b|\.heard\b", "train_epoch, running_metrics, averaged_weights, signal"),
    (r"\balso=", "evaluations="),
    (r"ExponentialAverage|StochasticAverage|LearningRateFactors|WarmUp\b", "EMA, SWA, LearningRateMultipliers"),
    (r"AdaptivePool\b|SynchronisedBatchNorm|\bFilled\b", "AdaptiveAveragePooling2D, SynchronizedBatchNorm, Constant"),
    (r"\bhomeless\b|misfit", "unexpected, mismatched"),
    (r"[Ll]ineage|LINEAGE|[Ww]iring", "source, architecture"),
    (r"worst_mistakes|\btiles\b|shares_as_percent", "top_losses, stat_cards, fractions_to_percent"),
    (r"\b(batches|optimizer|schedule|preprocessing|rows)_of\b", "verb first: build_batches"),
    (r"hold_out\b|\bsweep\(", "train_validation_split, remove_temp_files"),
    (r"STOREYS?\b|BACK_STAIRS|\bCELLS\b", "LAYERS, ALLOWED_CYCLES, ISOLATED"),
    (r"parity\.(question|subject|child|parent|verdict)\b", "parity.spec, loading, worker, launcher, compare"),
    (r"kvision\.(tracking|regularizers|interruption|transfer|run)\b", "kvision.report, layers, training, experiment"),
    (
        r"(?<![\w-])--(shift|border|erasing|clip|bias-factor|limit-test|test-every|checkpoint-every|licence|views"
        r"|accumulate|images-on|steps-at-once)(?![\w-])",
        "today's flags: python -m apps.cifar10 --help all",
    ),
    # American spelling
    (r"(?i)licence", "license"),
    (
        r"(?i)(synchron|normal|initial|regular|optim|serial|recogn|organ|general|summar|standard)is(e|ed|es|er|ers|ing|ation)\b",
        "-ize",
    ),
    (
        r"(?i)colour|\bcentre|\bgrey|neighbour|behaviour|honour|favour|\banalys(e|ing)\b",
        "color, center, gray, neighbor",
    ),
    # prose
    (r"\b(heeds?|hears?|yardstick)\b|odd one out|whole or not at all", "plain verbs: handle, baseline, atomically"),
    (r"\bof its own\b|\bas ever\b|\bto the bit\b", "leave it out; bit-exact"),
    (r"\b(that|which) ships?\b|drawn (shapes|digits)", "pretrained weights, synthetic"),
)

# Paths whose words are still to be replaced. The list only gets shorter, and is empty in the end.
EXEMPT = ()


def old_words(text: str) -> list[tuple[int, str, str]]:
    """(line, word, what to write instead) of each word of the earlier vocabulary."""
    return [
        (number, found[0], instead)
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in WORDS
        for found in re.finditer(pattern, line)
    ]


def test_old_words_are_found():
    text = "import engine as floors\nThe picture is normalised to grey.\npython -m apps.cifar10 --shift 2 --limit 3"
    assert [(number, word) for number, word, _ in old_words(text)] == [
        *((1, "floors"), (2, "picture"), (2, "normalised"), (2, "grey"), (3, "--shift")),
    ]
    assert old_words("normalized raise otherwise --crop-padding precise floor(x) exercise horizontal wise") == []


def test_the_words_are_those_of_the_field():
    faults = [
        f"{name}:{line}: {word!r}: write {instead}"
        for path in FILES
        if not (name := path.relative_to(ROOT).as_posix()).startswith(EXEMPT)
        for line, word, instead in old_words(path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)

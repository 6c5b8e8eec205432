"""How many threads the active backend computes with on a CPU.

PyTorch's threads wait for each other after every operation. Where an operation is shorter than that wait, one thread is
faster, and many times so where the machine has other work: softmax on MNIST in batches of 128, two cores beside other
processes, 21,605 images/s with one thread and 3,505 with two; an MLP 4,207 and 1,448. TensorFlow's and JAX's pools do
not wait so (TensorFlow, softmax: 13,832 and 11,591; with two more processes 6,226 and 15,246) and keep their number.
"""

import os

FEW = 100_000_000  # multiply-adds a step below which one thread of PyTorch's is taken: some milliseconds of one core

_all: list[int] = []  # PyTorch's own number of threads, as it was at the first call


def choose(multiply_adds: int) -> int:
    """Choose the number of threads for steps of so many multiply-adds (forwards, of a whole batch); the number.

    It depends on the network and the batch, not on a measurement: sums of other threads differ in their last bits, and
    a run that is resumed must have the same. Where the environment sets OMP_NUM_THREADS, and on an accelerator, nothing
    is changed.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        _all[:] = _all or [torch.get_num_threads()]
        if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
            torch.set_num_threads(1 if multiply_adds < FEW else _all[0])
        return torch.get_num_threads()
    if backend == "tensorflow":
        import tensorflow as tf

        if chosen := tf.config.threading.get_intra_op_parallelism_threads():
            return chosen
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""PyTorch: the step runs eagerly; the variables hold the state.

On a GPU a small network's step is over before Python has asked for its operations. So a step of pictures that lie on
the device is recorded once as a CUDA graph, and then replayed.
"""

import ctypes
import itertools
import os
import warnings
from contextlib import contextmanager
from functools import partial

import keras
import numpy as np
import torch
from keras import ops

from kvision.engine import check_model, check_targets, main_output
from kvision.engine.fuse import Graph, Recorder, is_graph, parts, penalties
from kvision.engine.keras_internals import (
    calling,
    index_of,
    storage,
    takes_training,
    uses_weight_decay,
    with_methods,
)
from kvision.engine.kernels_torch import BatchStatistics, lower


def configure(dtype: str, deterministic: bool, compile_cache) -> None:
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # every batch has one shape, for which the best is then found
    _keep_freed_memory()


def _keep_freed_memory():
    """Let the C library keep what a step frees for the next step, where it is glibc.

    It gives large blocks back to the system at once, whose pages the next step then has to be given anew: up to a fifth
    of ResNet-20's time on a CPU. See M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in mallopt(3).
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-3, 2**25)


def accelerated() -> bool:
    return torch.cuda.is_available()


@contextmanager
def full_precision():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


class Engine:
    def __init__(self, model, optimizer=None, loss=None, gradient_accumulation_steps=1, metrics=()):
        check_model(model)
        self.model, self.optimizer, self.loss, self.gradient_accumulation_steps = (
            model,
            optimizer,
            loss,
            gradient_accumulation_steps,
        )
        self.metrics, self._is_graph = list(metrics), is_graph(model)
        self._graphs = {}
        self._recording = None
        if optimizer is not None:
            _lay_out([*model.trainable_variables, *optimizer.variables])
            self._fast_optimizer = with_methods(optimizer, _fast_methods)

    def _call(self, images, training):
        if not self._is_graph:
            options = {"training": training} if takes_training(self.model) else {}
            return self.model(ops.convert_to_tensor(images), **options)
        if training not in self._graphs:
            self._graphs[training] = self._graph(training)
        graph, statistics = self._graphs[training]
        statistics.clear()  # of a pass that was broken off
        with calling(self.model, training):
            outputs = graph(ops.convert_to_tensor(images))
        statistics.keep()
        return outputs

    def _graph(self, training, fuse=True):
        statistics = BatchStatistics()
        return Graph(self.model, partial(lower, training=training, statistics=statistics), training, fuse), statistics

    def _objective(self, images, labels, training):
        """The loss with its penalties, the labels on the device, and the outputs."""
        outputs, labels = self._call(images, training), ops.convert_to_tensor(labels)
        return self.loss(labels, outputs) + penalties(self.model), labels, main_output(outputs)

    def _part(self, images, labels):
        variables = [variable.value for variable in self.model.trainable_variables]
        loss, labels, logits = self._objective(images, labels, training=True)
        scaled = self.optimizer.scale_loss(loss) if self.optimizer else loss
        # A variable that the loss does not use has no gradient: None.
        gradients = torch.autograd.grad(scaled, variables, allow_unused=True)
        with torch.no_grad():
            for metric in self.metrics:
                metric.update_state(_classes(labels), logits)
            return loss.detach(), _count(labels, logits), gradients

    def _differentiate(self, images, labels):
        if self.gradient_accumulation_steps == 1:
            return self._part(images, labels)
        first, *others = parts(self.gradient_accumulation_steps, (images, labels))
        loss, correct, gradients = self._part(*first)
        used = [gradient is not None for gradient in gradients]
        sums = list(itertools.compress(gradients, used))
        for part in others:
            more_loss, more_correct, more = self._part(*part)
            loss, correct = loss + more_loss, correct + more_correct
            torch._foreach_add_(sums, list(itertools.compress(more, used)))
        torch._foreach_div_(sums, self.gradient_accumulation_steps)
        sums = iter(sums)
        return loss / self.gradient_accumulation_steps, correct, [next(sums) if is_used else None for is_used in used]

    def train_step(self, images, labels):
        check_targets(labels)
        loss, correct, gradients = self._differentiate(images, labels)
        with torch.no_grad():
            self._fast_optimizer.apply(gradients, self.model.trainable_variables)
        return loss, correct

    def train_steps(self, pictures, params):
        params = ops.convert_to_tensor(params)
        # With loss scaling the host decides by a value of the device whether a step counts.
        if accelerated() and not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            if self._recording is None or self._recording.pictures is not pictures:
                self._recording = _Recording(self.train_step, pictures)
            results = [self._recording.step(draw) for draw in params]
        else:
            results = [self.train_step(*pictures.make_batch(pictures.tensors, draw)) for draw in params]
        return [torch.stack(values) for values in zip(*results, strict=True)]

    def value_and_grad(self, images, labels):
        loss, _, gradients = self._differentiate(images, labels)
        pairs = zip(gradients, self.model.trainable_variables, strict=True)
        return loss, [torch.zeros_like(variable.value) if grad is None else grad for grad, variable in pairs]

    def predict(self, images):
        with torch.inference_mode():
            return ops.convert_to_numpy(main_output(self._call(images, training=False)))

    def predict_on_device(self, pictures, params):
        with torch.inference_mode():
            shown = (pictures.make_batch(pictures.tensors, draw)[0] for draw in ops.convert_to_tensor(params))
            return ops.convert_to_numpy(torch.stack([main_output(self._call(x, training=False)) for x in shown]))

    def evaluate(self, images, labels):
        with torch.inference_mode():
            loss, labels, logits = self._objective(images, labels, training=False)
            return loss, _count(labels, logits)

    def layer_outputs(self, images, training=False):
        seen, (graph, statistics) = Recorder(), self._graph(training, fuse=False)
        with torch.no_grad(), calling(self.model, training):
            graph(ops.convert_to_tensor(images), seen)
        statistics.keep()
        return seen.rows

    def sync_variables(self):
        pass


def _lay_out(variables):
    """Keep kernels, and what an optimizer keeps of them, in memory as PyTorch's channels_last kernels lie.

    A kernel's shape stays (h, w, i, o). A convolution takes it as it lies, and its gradient lies the same way, so that
    an update passes over both in one order.
    """
    for variable in variables:
        if len(variable.shape) == 4 and (tensor := storage(variable)) is not None:
            tensor.data = tensor.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def _fast_methods(optimizer):
    """Keras's own methods of an optimizer in a quicker form; a method that its class has of its own stays."""
    kind, methods = type(optimizer), {}
    if (
        kind._apply_weight_decay is keras.optimizers.Optimizer._apply_weight_decay
        and optimizer.weight_decay is not None
    ):
        methods["_apply_weight_decay"] = _weight_decay()
    sgd = keras.optimizers.SGD
    if accelerated() and isinstance(optimizer, sgd) and kind.__module__.startswith("keras."):
        methods["_parallel_update_step"] = _sgd_step
    return methods


def _weight_decay():
    """Decoupled weight decay; Keras looks every variable's name up by regular expressions in every step."""
    decayed = {}

    def decay(optimizer, variables):
        for variable in variables:
            if id(variable) not in decayed:
                decayed[id(variable)] = variable, uses_weight_decay(optimizer, variable)
        rate = ops.convert_to_tensor(optimizer.learning_rate) * optimizer.weight_decay
        kernels = [variable.value for variable in variables if decayed[id(variable)][1]]
        if kernels:
            torch._foreach_mul_(kernels, 1 - rate)

    return decay


def _sgd_step(optimizer, gradients, variables, learning_rate):
    """SGD that multiplies by the learning rate where it lies; Keras hands it to PyTorch as a number, for which the host
    waits until the device has computed it."""
    values = [variable.value for variable in variables]
    changes = torch._foreach_mul(list(gradients), -ops.convert_to_tensor(learning_rate))
    if optimizer.momentum:
        momenta = [optimizer.momentums[index_of(optimizer, variable)].value for variable in variables]
        torch._foreach_mul_(momenta, optimizer.momentum)
        torch._foreach_add_(momenta, changes)
        if optimizer.nesterov:
            torch._foreach_add_(values, changes)
            torch._foreach_add_(values, momenta, alpha=optimizer.momentum)
        else:
            torch._foreach_add_(values, momenta)
    else:
        torch._foreach_add_(values, changes)


class _Recording:
    """Steps of pictures on a GPU: the first ones run as they are, then one is recorded as a CUDA graph and replayed.

    A step that cannot be recorded, as one that waits for a value of the device, runs as it is for good.
    """

    WARMUP = 3  # steps in which PyTorch makes what it keeps: algorithms, handles, memory

    def __init__(self, step, pictures):
        self.pictures, self.taken, self.recorded = pictures, 0, None
        self.draw = None
        self.run = lambda draw: step(*pictures.make_batch(pictures.tensors, draw))
        self.stream = torch.cuda.Stream()

    def step(self, draw):
        """The loss and the correct answers of one step."""
        self.taken += 1
        if self.draw is None or self.draw.shape != draw.shape:
            self.draw, self.recorded, self.taken = draw.clone(), None, 1
        self.draw.copy_(draw)
        if self.taken == self.WARMUP + 1:
            self.record()
        if self.recorded is None:
            return self.aside()
        graph, results = self.recorded
        graph.replay()
        return [result.clone() for result in results]

    def aside(self):
        """The step beside the default stream, on which nothing can be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.run(self.draw)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with _Filled(), torch.cuda.graph(graph, stream=self.stream):
                results = self.run(self.draw)
        except Exception as error:
            warnings.warn(f"PyTorch's steps run one by one, as they cannot be a CUDA graph: {error}", stacklevel=2)
            return
        self.recorded = graph, results


class _Filled(torch.overrides.TorchFunctionMode):
    """Within this a tensor of few numbers is filled on the device: what is copied from the host cannot be recorded.

    Keras makes such ones of shapes, bounds and rates.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.as_tensor, torch.tensor) and args and not isinstance(args[0], torch.Tensor):
            numbers = np.asarray(args[0])
            if 0 < numbers.size <= 64:
                filled = [torch.full((), number, **kwargs) for number in numbers.ravel().tolist()]
                return torch.stack(filled).reshape(numbers.shape) if numbers.ndim else filled[0]
        return function(*args, **kwargs)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x / torch.distributed.get_world_size()

    @staticmethod
    def backward(context, gradient):
        return _Mean.apply(gradient)


def mean_over_replicas(x):
    return _Mean.apply(x) if torch.distributed.is_initialized() else x


def _classes(labels):
    """Integer labels (n,); of targets (n, classes) the largest."""
    return labels.argmax(dim=-1) if labels.ndim == 2 else labels


def _count(labels, logits):
    """How many of the largest logits are right."""
    return (logits.argmax(dim=-1) == _classes(labels)).sum()

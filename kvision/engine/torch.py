"""PyTorch: the step runs eagerly; the variables hold the state.

On a GPU a small network's step is over before Python has launched its operations. So a step on a data set that lies on
the device is recorded once as a CUDA graph, and then replayed.
"""

import ctypes
import itertools
import operator
import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial

import keras
import numpy as np
import torch
from keras import ops

from kvision.engine.fuse import Graph, Recorder, is_graph
from kvision.engine.keras_internals import (
    PARALLEL_UPDATE,
    WEIGHT_DECAY,
    calling,
    has_plain_weight_decay,
    index_of,
    storage,
    takes_training,
    uses_weight_decay,
    with_methods,
)
from kvision.engine.kernels_torch import BatchStatistics, lower
from kvision.engine.program import Program, gradients_or_zeros, split


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


def generator_states():
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [np.asarray(state) for state in (torch.get_rng_state(), *cards)]


def set_generator_states(states):
    first, *cards = map(torch.from_numpy, states)
    torch.set_rng_state(first)
    if len(cards) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cards)


def why_keras(model):
    return "it is compiled with jit_compile=True" if model.jit_compile and not model.run_eagerly else None


class Engine:
    def __init__(self, models, task=None, optimizers=None, gradient_accumulation_steps=1):
        self.program = Program(models, task, optimizers)
        self.model, self.gradient_accumulation_steps = self.program.model, gradient_accumulation_steps
        self._graphs = {}
        self._recording = None
        if self.program.optimizers:
            slots = [variable for optimizer in self.program.optimizers for variable in optimizer.variables]
            _lay_out([*self.program.trainable, *slots])
        self._fast_optimizers = [with_methods(optimizer, _fast_methods) for optimizer in self.program.optimizers]

    def _call(self, name, inputs, training):
        model, key = self.program.models[name], (name, training)
        if key not in self._graphs:
            self._graphs[key] = self._graph(model, training) if is_graph(model) else None
        if self._graphs[key] is None:
            return model(inputs, **({"training": training} if takes_training(model) else {}))
        graph, statistics = self._graphs[key]
        statistics.clear()  # of a pass that was broken off
        with calling(model, training):
            outputs = graph(inputs)
        statistics.keep()
        return outputs

    def _graph(self, model, training, fuse=True):
        statistics = BatchStatistics()
        return Graph(model, partial(lower, training=training, statistics=statistics), training, fuse), statistics

    def _part(self, phase, batch):
        """The Means of a phase on a part of a batch, and its gradients."""
        restored = [(variable, variable.value.clone()) for variable in phase.restored]
        loss, means = self.program.objective(phase, self._call, batch)
        scaled = phase.optimizer.scale_loss(loss) if phase.optimizer else loss
        # A variable that the loss does not use has no gradient: None.
        variables = [variable.value for variable in phase.variables]
        gradients = torch.autograd.grad(scaled, variables, allow_unused=True)
        for variable, value in restored:
            variable.assign(value)
        return _map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, means), gradients

    def _differentiate(self, phase, batch):
        count = self.gradient_accumulation_steps
        if count == 1:
            return self._part(phase, batch)
        first, *others = split(batch, count)
        means, gradients = self._part(phase, first)
        used = [gradient is not None for gradient in gradients]
        sums = list(itertools.compress(gradients, used))
        for part in others:
            more, gradients = self._part(phase, part)
            means = {name: tuple(map(operator.add, means[name], more[name])) for name in means}
            torch._foreach_add_(sums, list(itertools.compress(gradients, used)))
        torch._foreach_div_(sums, count)
        sums = iter(sums)
        return means, [next(sums) if is_used else None for is_used in used]

    def _train(self, batch):
        found = {}
        for phase, optimizer in zip(self.program.phases, self._fast_optimizers, strict=True):
            means, gradients = self._differentiate(phase, batch)
            with torch.no_grad():
                optimizer.apply(gradients, phase.variables)
            found |= means
        return found

    def train_step(self, batch):
        self.program.check(batch)
        return self._train(_tensors(batch))

    def train_steps(self, dataset, params):
        params = ops.convert_to_tensor(params)
        # With loss scaling the host decides by a value of the device whether a step counts.
        scaled = any(isinstance(one, keras.optimizers.LossScaleOptimizer) for one in self.program.optimizers)
        if accelerated() and not scaled:
            if self._recording is None or self._recording.dataset is not dataset:
                self._recording = _Recording(self._train, dataset)
            results = [self._recording.step(param) for param in params]
        else:
            results = [self._train(dataset.make_batch(dataset.tensors, param)) for param in params]
        return stack(results)

    def value_and_grad(self, batch, phase=None):
        phase = self.program.phase(phase)
        means, gradients = self._differentiate(phase, _tensors(batch))
        total, weight = means[phase.reported]
        return total / weight, gradients_or_zeros(gradients, phase.variables)

    def predict(self, batch):
        with torch.inference_mode():
            return keras.tree.map_structure(ops.convert_to_numpy, self.program.predict(self._call, _tensors(batch)))

    def predict_on_device(self, dataset, params):
        with torch.inference_mode():
            batches = (dataset.make_batch(dataset.tensors, param) for param in ops.convert_to_tensor(params))
            results = [self.program.predict(self._call, batch) for batch in batches]
            return keras.tree.map_structure(lambda *leaves: ops.convert_to_numpy(torch.stack(leaves)), *results)

    def evaluate(self, batch):
        with torch.inference_mode():
            return self.program.metrics(self._call, _tensors(batch))

    def evaluate_on_device(self, dataset, param):
        return self.evaluate(dataset.make_batch(dataset.tensors, ops.convert_to_tensor(param)))

    def layer_outputs(self, batch, training=False):
        seen, (graph, statistics) = Recorder(), self._graph(self.model, training, fuse=False)
        with torch.no_grad(), calling(self.model, training):
            graph(ops.convert_to_tensor(batch), seen)
        statistics.keep()
        return seen.rows

    def sync_variables(self):
        pass

    def keras_steps(self):
        task = self.program.task

        def train_step(data):
            self._train(_tensors(task.batch(data)))
            return task.logs()

        def test_step(data):
            self.program.metrics(self._call, _tensors(task.batch(data)))
            return task.logs()

        return train_step, test_step


def _tensors(tree):
    def tensor(leaf):
        return None if leaf is None else ops.convert_to_tensor(leaf)

    return keras.tree.map_structure(tensor, dict(tree) if isinstance(tree, Mapping) else tree)


def _map(function, means):
    return {name: (function(total), function(weight)) for name, (total, weight) in means.items()}


def stack(results):
    """The Means of several steps as one, whose sums and weights have an axis of the steps."""

    def together(leaves):
        return torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else torch.tensor(leaves)

    return {name: tuple(together([result[name][i] for result in results]) for i in range(2)) for name in results[0]}


def _lay_out(variables):
    """Keep kernels, and what an optimizer keeps of them, in memory as PyTorch's channels_last kernels lie.

    A kernel's shape stays (h, w, i, o). A convolution takes it as it lies, and its gradient lies the same way, so that
    an update passes over both in one order.
    """
    for variable in variables:
        if len(variable.shape) == 4 and (tensor := storage(variable)) is not None:
            tensor.data = tensor.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def _fast_methods(optimizer):
    """Faster forms of Keras's methods of an optimizer; a method that its class overrides stays."""
    kind, methods = type(optimizer), {}
    if has_plain_weight_decay(optimizer):
        methods[WEIGHT_DECAY] = _weight_decay()
    sgd = keras.optimizers.SGD
    if accelerated() and isinstance(optimizer, sgd) and kind.__module__.startswith("keras."):
        methods[PARALLEL_UPDATE] = _sgd_step
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
    """Steps of a data set on a GPU: the first ones run as they are, then one is recorded as a CUDA graph and replayed.

    A step that cannot be recorded, as one that waits for a value of the device, runs as it is for good.
    """

    WARMUP = 3  # steps in which PyTorch makes what it keeps: algorithms, handles, memory

    def __init__(self, step, dataset):
        self.dataset, self.taken, self.recorded = dataset, 0, None
        self.param = None
        self.run = lambda param: step(dataset.make_batch(dataset.tensors, param))
        self.stream = torch.cuda.Stream()

    def step(self, param):
        """The Means of one step."""
        self.taken += 1
        if self.param is None or self.param.shape != param.shape:
            self.param, self.recorded, self.taken = param.clone(), None, 1
        self.param.copy_(param)
        if self.taken == self.WARMUP + 1:
            self.record()
        if self.recorded is None:
            return self.aside()
        graph, means = self.recorded
        graph.replay()
        return _map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, means)

    def aside(self):
        """The step beside the default stream, on which nothing can be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            means = self.run(self.param)
        torch.cuda.current_stream().wait_stream(self.stream)
        return means

    def record(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with _Filled(), torch.cuda.graph(graph, stream=self.stream):
                means = self.run(self.param)
        except Exception as error:
            warnings.warn(f"PyTorch's steps run one by one, as they cannot be a CUDA graph: {error}", stacklevel=2)
            return
        self.recorded = graph, means


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

"""PyTorch: a whole step on a data set on the device as one program of Inductor, the compiler behind `torch.compile`.

The engine's own step is run once under a recorder of tensor operations, with every variable of the models, the
optimizers and the task as an argument, and what was recorded is compiled: making the batch, both ways through the
network, the running statistics and the update. Keras's Python is then out of the way, so a tracer of Python need not
understand it. On a GPU the program is recorded as a CUDA graph and replayed, as the engine does with its own step.
"""

import torch
from keras import StatelessScope
from torch._inductor import compile as compile_graph
from torch.fx.experimental.proxy_tensor import make_fx

from kvision.engine import torch as eager
from kvision.engine.keras_internals import storage


def compile_steps(engine) -> None:
    """Let `engine.train_steps` take compiled steps.

    The first call compiles for the shape of its params, in 20 s to a minute; another shape of them is compiled anew.
    Variables are as exact as before, but operations that Inductor fuses keep float32 between them, where one by one
    they round to what the layers compute in.

    Args:
        engine: of this backend, with an optimizer, gradients not accumulated.
    """
    engine.train_steps = _CompiledSteps(engine)


class _CompiledSteps:
    def __init__(self, engine):
        self.engine, self.dataset, self.recording = engine, None, None

    def __call__(self, dataset, params):
        params = torch.as_tensor(params, device=dataset.tensors[0].device)
        if self.dataset is not dataset:
            self.dataset, self.step = dataset, _Program(self.engine, dataset)
            if eager.accelerated():
                self.recording = eager._Recording(None, dataset)
                self.recording.run = self.step
        step = self.recording.step if self.recording else self.step
        return eager.stack([step(param) for param in params])


class _Recordable(eager._Filled):
    """Within this nothing is copied from the host, as in a CUDA graph, and one-hot vectors are made without a look at
    the labels, which a recording of operations cannot take."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.one_hot:
            labels, classes = args
            return (labels[..., None] == torch.arange(classes, device=labels.device)).long()
        return super().__torch_function__(function, types, args, kwargs)


class _Program:
    """One step: `program(param)` gives its Means, and leaves the variables after it."""

    def __init__(self, engine, dataset):
        self.engine, self.dataset = engine, dataset
        program = engine.program
        slots = [variable for optimizer in program.optimizers for variable in optimizer.variables]
        self.trained = program.trainable
        self.variables = [*self.trained, *program.fixed, *slots]
        self.tensors = [storage(variable).detach() for variable in self.variables]
        self.compiled = {}

    def __call__(self, param):
        arguments = [*self.tensors, *self.dataset.tensors, param]
        if param.shape not in self.compiled:
            before = [tensor.clone() for tensor in self.tensors]
            with _Recordable():
                recorded = make_fx(self._step)(*arguments)
            torch._foreach_copy_(self.tensors, before)  # recording took a step
            self.compiled[param.shape] = compile_graph(recorded, arguments), self.means
        program, means = self.compiled[param.shape]
        with torch.no_grad():
            leaves = iter(program(*arguments))
        return eager._map(lambda leaf: next(leaves) if isinstance(leaf, torch.Tensor) else leaf, means)

    def _step(self, *arguments):
        count = len(self.variables)
        tensors, (*data, param) = arguments[:count], arguments[count:]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[: len(self.trained)]]
        values = [*leaves, *tensors[len(leaves) :]]
        mapping = list(zip(self.variables, values, strict=True))
        with StatelessScope(state_mapping=mapping, collect_losses=True) as scope, torch.enable_grad():
            means = self.engine._train(self.dataset.make_batch(tuple(data), param))
        with torch.no_grad():
            for variable, tensor in zip(self.variables, tensors, strict=True):
                tensor.copy_(scope.get_current_value(variable))
        self.means = means
        return [leaf for pair in means.values() for leaf in pair if isinstance(leaf, torch.Tensor)]

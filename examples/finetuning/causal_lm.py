"""A causal language model of transformers, prepared for training: any that has a list of layers and a linear head.

The model does not run its head, because all logits would exist at once. Instead the input of the head is passed to
`chunked_loss`; the model's own code processes the logits afterwards (capping or scaling), chunk by chunk. `check`
compares the result with the model's own logits.

The positions of each document in a row begin at 0, from which transformers derives the attention mask between
documents. Some models do not support this (those with a recurrent state, or that ignore positions), so `check` tests
it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from chunked_loss import chunked_loss
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finetuning.packing import Batch

_TOLERANCE = 0.02  # of losses in 16 bits, relative
_PROBE = 8  # tokens


class CausalLM:
    """The model, and how its loss is computed.

    Args:
        model: an `AutoModelForCausalLM`, on its device.
        chunks: pieces that the tokens with targets are cut into for the loss.

    Attributes:
        separates_documents: whether what stands before a document in its row is without influence on it: found by
            `check`, False before.

    Raises:
        ValueError: for a model without a list of layers or without a linear head of its own.
    """

    def __init__(self, model: Any, chunks: int) -> None:
        self.model = model
        self.chunks = chunks
        self.separates_documents = False
        self.layers = decoder_layers(model)
        self._kind = model.config.model_type
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the model must have a linear head on top of its decoder, got {type(model).__name__}")
        self._head, self._own_head = head, head.forward
        self._taken: Tensor | None = None
        self._accepted = inspect.signature(model.forward).parameters
        # Where a model also reads images, token types say what is one: nothing is.
        self._typed = "token_type_ids" in self._accepted and model.config.get_text_config() is not model.config
        _set_forward(head, self._take)
        with self._probing():
            self._base, self._outputs = self._decoder()
            self._finishes = self._finish(torch.zeros(2, head.out_features, device=head.weight.device)) is not None

    def prepare(self, *, checkpointed: bool = True, backend: str | None = None) -> None:
        """Checkpoints each layer, so that it keeps only its input for backward, and compiles each layer by itself.

        All layers of a kind share one graph, and each returns its gradients before the next one begins; a model that is
        compiled as a whole would hold all gradients at once.

        Args:
            backend: the backend of torch.compile; None to compile no layers.
        """
        for layer in self.layers:
            _set_forward(layer, _prepared(layer.forward, checkpointed, backend))

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats of the batch's targets."""
        x = self.hidden(batch).flatten(0, 1)
        if len(batch.trained) < len(x):
            x = x.index_select(0, batch.trained)
        finish = self._finished if self._finishes else None
        return chunked_loss(x, self._head.weight, batch.targets, self.chunks, bias=self._head.bias, finish=finish)

    def hidden(self, batch: Batch) -> Tensor:
        """The input of the head, (rows, length, hidden)."""
        self.model(**self._arguments_of(batch))
        taken, self._taken = self._taken, None
        if taken is None or taken.dim() != 3:
            raise ValueError(f"the loss of {self._kind} cannot be computed in chunks: its head is not given all tokens")
        return taken

    def logits(self, batch: Batch) -> Tensor:
        """The model's own logits, whole, (rows, length, vocabulary)."""
        with _replaced(self._head, self._own_head):
            logits: Tensor = self.model(**self._arguments_of(batch)).logits
        return logits

    def _arguments_of(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's forward for a batch."""
        given = {"input_ids": batch.tokens, "position_ids": batch.positions, "use_cache": False}
        if self._typed:
            given["token_type_ids"] = torch.zeros_like(batch.tokens)
        return {name: value for name, value in given.items() if name in self._accepted}

    def check(self, rows: int) -> None:
        """Compares the loss with that of the model's own logits, and tests for attention to later tokens and to other
        documents. Call it before `prepare`: its batches are short, and compiling for them would take longer.

        Args:
            rows: the rows of a batch. Some implementations of attention separate documents only in a single row.

        Raises:
            ValueError: if the losses differ, or if a token attends to later ones.
        """
        half = _PROBE // 2
        batch = self._probe(torch.arange(half).repeat(2), rows)
        with self._probing():
            mine = self.loss(batch).item()
            logits = self.logits(batch).flatten(0, 1)
            own = functional.cross_entropy(logits[batch.trained].float(), batch.targets).item()
            if not abs(mine - own) <= _TOLERANCE * max(own, 1):
                raise ValueError(
                    f"{self._kind} cannot be trained with a loss in chunks: it comes to {mine:.4f} nats where the"
                    f" model's own logits give {own:.4f}"
                )
            first, second = self._influences(batch, slice(0, 1)), self._influences(batch, slice(half, None))
        if first[1:].any():
            raise ValueError(f"{self._kind} is no causal language model as configured: tokens see later ones")
        self.separates_documents = not second[:half].any()

    def _influences(self, batch: Batch, place: slice) -> Tensor:
        """Whether each token influences the input of the head at `place`, (length,).

        A token without influence has a gradient of exactly zero; comparing results would need a tolerance for rounding.
        """
        embedded: list[Tensor] = []

        def watched(module: nn.Module, arguments: Any, result: Tensor) -> Tensor:
            embedded.append(result.detach().requires_grad_())
            return embedded[0].clone()  # which the model may change in place

        trained = [p for p in self.model.parameters() if p.requires_grad]
        watch = self.model.get_input_embeddings().register_forward_hook(watched)
        try:
            for p in trained:
                p.requires_grad_(False)  # their gradients would take as much as the weights
            with torch.enable_grad():
                hidden = self.hidden(batch)[:, place].float()
                # Not the plain sum, which is the same for all results of a norm.
                weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
                (grad,) = torch.autograd.grad((hidden * weights).sum(), embedded)
        finally:
            watch.remove()
            for p in trained:
                p.requires_grad_()
        return (grad != 0).any(-1).any(0)

    def _probe(self, positions: Tensor, rows: int = 1) -> Batch:
        """A batch of equal rows of different tokens; those of the first row are targets."""
        device = self._head.weight.device
        tokens = 1 + torch.arange(_PROBE, device=device)
        trained = torch.arange(_PROBE - 1, device=device)
        return Batch(tokens.expand(rows, -1), positions.to(device).expand(rows, -1), trained, tokens[1:])

    @contextmanager
    def _probing(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _take(self, x: Tensor) -> Tensor:
        """Replaces the head's forward: keeps its input."""
        self._taken = x
        return x.new_zeros(*x.shape[:-1], 1)

    def _decoder(self) -> tuple[nn.Module, Any]:
        """The module that the model calls for hidden states, and what it returns."""
        seen: list[tuple[nn.Module, Any]] = []
        candidates = {id(m): m for m in (self.model.get_decoder(), self.model.base_model) if m is not self.model}
        watches = [
            module.register_forward_hook(lambda module, _, outputs: seen.append((module, copy.copy(outputs))))
            for module in candidates.values()
        ]
        self.hidden(self._probe(torch.arange(_PROBE)))
        for watch in watches:
            watch.remove()
        if not seen or not hasattr(seen[-1][1], "last_hidden_state"):
            raise ValueError(f"the model must call a decoder for hidden states, got {type(self.model).__name__}")
        return seen[-1]  # the outermost returns last

    def _finished(self, logits: Tensor) -> Tensor:
        finished = self._finish(logits)
        return logits if finished is None else finished

    def _finish(self, logits: Tensor) -> Tensor | None:
        """The model's own function of the head's result, (tokens, vocabulary); None if it is the identity.

        The model runs with its decoder and its head replaced: neither computes anything.
        """
        given = logits.unsqueeze(0)
        hidden = self._outputs.last_hidden_state
        self._outputs.last_hidden_state = hidden.new_zeros(1, 1, 1).expand(*given.shape[:-1], hidden.shape[-1])
        tokens = torch.zeros(given.shape[:-1], dtype=torch.int64, device=given.device)
        with _replaced(self._base, lambda *_, **__: self._outputs), _replaced(self._head, lambda _: given):
            result: Tensor = self.model(input_ids=tokens).logits
        return None if result is given else result.squeeze(0)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's decoder layers: as many as its configuration has or, among several and where there is none,
    the one with the most parameters.

    Raises:
        ValueError: where there is no list of modules.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"the model must have a list of decoder layers, got {type(model).__name__}, which has none")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)

    def rank(layers: nn.ModuleList) -> tuple[bool, int]:
        return len(layers) == count, sum(p.numel() for p in layers.parameters())

    return max(lists, key=rank)


def _prepared(forward: Callable[..., Any], checkpointed: bool, backend: str | None) -> Callable[..., Any]:
    def kept_alone(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    # A checkpoint within the compiled function computes only what backward needs anew, not the last product.
    run = kept_alone if checkpointed else forward
    return run if backend is None else torch.compile(run, dynamic=False, backend=backend)


def _set_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Replaces the forward of this one module by another function."""
    module.forward = forward


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which the module has another forward."""
    own = module.__dict__.get("forward")
    _set_forward(module, forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            _set_forward(module, own)

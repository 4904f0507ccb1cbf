"""Parameter groups: `param_groups` makes them from a model, `take_group` checks those that an optimizer is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from collins.entries import ParamEntry, label
from collins.options import check_options, shown
from collins.parameter import check_param
from collins.roles import Role, roles_of_modules


class NamedParameter(tuple[str, Tensor]):
    """A pair (name, parameter), as every optimizer of torch accepts it, with the role that follows from its module.

    Attributes:
        role: that role; None if the module does not determine one.
    """

    role: Role | None

    def __new__(cls, name: str, p: Tensor, role: Role | None = None) -> NamedParameter:
        pair = super().__new__(cls, (name, p))
        pair.role = role
        return pair


def named_parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """The parameters of a model, tied ones once, with names and with the roles that follow from modules."""
    roles = roles_of_modules(model)
    return (NamedParameter(name, p, roles.get(name)) for name, p in model.named_parameters())


def params_of(given: ParamsT | nn.Module) -> ParamsT:
    """The parameters for the base class: the named parameters of a module, or `given` itself if it is not a module.

    A ParameterList has no useful names, and is treated as a list, as every optimizer of torch does.
    """
    if isinstance(given, nn.ParameterList) or not isinstance(given, nn.Module):
        return given
    return named_parameters(given)


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, no_decay: Iterable[str | type[nn.Module]] = ()
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in two groups, with weight decay and without, for Collins and for AdamW.

    The group without decay holds vectors (at most one dimension), biases (parameters or modules whose name ends in
    "bias"), the parameters of norms (modules with "norm" in the name of their class: LayerNorm, LlamaRMSNorm,
    GroupNorm), the parameters that `no_decay` lists, and those that the model's own `no_weight_decay()` lists, as
    models of timm have it. Embeddings and output heads are decayed, as in transformers' Trainer and in timm: list them
    to change that.

    Each group has its parameters as pairs of name and tensor. The pairs also carry the roles that `Collins(model)`
    finds from the modules, such as token tables. Frozen parameters are left out. An empty group is left out.

    Args:
        model: the model whose `named_parameters` are used, tied ones once.
        weight_decay: the weight decay of the first group.
        no_decay: further parameters without decay. A class of modules selects all parameters directly in such modules.
            A string selects parameters whose name is the string, or contains it between two dots: "bias",
            "LayerNorm.weight", "pos_embed", "model.embed_tokens", with * for any characters ("*norm*").

    Raises:
        TypeError: if the model is not a module, and for other values in `no_decay`.

    Example:
        >>> from collins import Collins, param_groups
        >>> model = nn.Sequential(nn.Embedding(8192, 64), nn.LayerNorm(64), nn.Linear(64, 8192))
        >>> opt = Collins(param_groups(model, weight_decay=0.1, no_decay=[nn.Embedding]), lr=3e-3)
        >>> [(group["weight_decay"], group["param_names"]) for group in opt.param_groups]
        [(0.1, ['2.weight']), (0.0, ['0.weight', '1.weight', '1.bias', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patterns, kinds = _listed(model, no_decay)
    kept = {
        id(p)
        for module in model.modules()
        if isinstance(module, kinds) or "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    groups: dict[float, list[NamedParameter]] = {weight_decay: [], 0.0: []}
    for pair in named_parameters(model):
        name, p = pair
        if p.requires_grad:
            without = p.ndim <= 1 or id(p) in kept or any(pattern.search(name) for pattern in [_BIAS, *patterns])
            groups[0.0 if without else weight_decay].append(pair)
    return [{"params": pairs, "weight_decay": decay} for decay, pairs in groups.items() if pairs]


_BIAS = re.compile(r"bias(\.|$)")


def _listed(
    model: nn.Module, no_decay: Iterable[str | type[nn.Module]]
) -> tuple[list[re.Pattern[str]], tuple[type[nn.Module], ...]]:
    accepted = "names, patterns or classes of modules"
    if isinstance(no_decay, str | type) or not isinstance(no_decay, Iterable):
        raise TypeError(f"no_decay must be a list of {accepted}, got {shown(no_decay)}")
    listed = list(no_decay)
    for each in listed:
        if not (isinstance(each, str) or (isinstance(each, type) and issubclass(each, nn.Module))):
            raise TypeError(f"no_decay must list {accepted}, got {shown(each)}")
    of_the_model = getattr(model, "no_weight_decay", None)
    texts = [each for each in listed if isinstance(each, str)] + list(of_the_model() if callable(of_the_model) else ())
    patterns = [re.compile(rf"(^|\.){re.escape(text).replace(re.escape('*'), '.*')}(\.|$)") for text in texts]
    return patterns, tuple(each for each in listed if isinstance(each, type))


def take_group(
    param_group: dict[str, Any], defaults: Mapping[str, Any], present: Iterable[ParamEntry]
) -> dict[str, Role]:
    """Checks the options and the parameters of a new group, whose parameters become a list.

    Args:
        param_group: the group.
        defaults: the options for which the group sets no value.
        present: the entries that the optimizer has already.

    Returns:
        The roles of its parameters that follow from modules, by name.

    Raises:
        ValueError, TypeError: as `Collins.add_param_group`.
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"param_group must be a dict with the key 'params', got {param_group!r}")
    params = param_group["params"]
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(
            f"params of a group must be tensors or pairs of name and tensor, got a {type(params).__name__}, whose"
            " parameters would lack their names within the model: select them from model.named_parameters(), or use"
            " the groups that collins.param_groups(model) returns"
        )
    group = {**defaults, **param_group}
    check_options(group)
    param_group.update({name: group[name] for name in defaults if name in param_group})
    if not isinstance(params, (Tensor, set)):  # the base class accepts a tensor and refuses a set
        params = param_group["params"] = list(params)
    seen = {id(entry.p): entry.name for entry in present}
    by_module: dict[str, Role] = {}
    for place, named in enumerate([params] if isinstance(params, Tensor) else params):
        name, p = named if isinstance(named, tuple) else (place, named)
        if not isinstance(p, Tensor):
            continue  # the base class refuses it
        check_param(label(name), p, group)
        if id(p) in seen:
            raise ValueError(
                f"{label(name)} of the new group is already in the optimizer as {seen[id(p)]}; pass it once"
            )
        seen[id(p)] = label(name)
        if isinstance(named, NamedParameter) and named.role is not None:
            by_module[named[0]] = named.role
    return by_module

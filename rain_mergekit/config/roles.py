"""Which of the two other models is the instruct model, and which the pretrained one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from rain_mergekit.errors import RainError

OTHER = {"instruct": "pretrained", "pretrained": "instruct"}


def assign_roles(
    models: Sequence[Hashable],
    explicit: Mapping[Hashable, str | None],
    recorded: Mapping[str, str],
) -> dict[str, Hashable]:
    """Return the model of each role, `instruct` and `pretrained`.

    Args:
        models: the two models besides the base model.
        explicit: the configured role of each, or None.
        recorded: the model reference that the calibration recorded for each role. A model without
            a role takes the one under which its name is recorded, or else the remaining one.

    Raises:
        RainError: a role is missing, given twice, or contradicts the calibration.
    """
    known = {model: _recorded_role(model, recorded) for model in models}
    roles = {model: explicit.get(model) or known[model] for model in models}
    for model in models:
        if known[model] is not None and roles[model] != known[model]:
            raise RainError(_contradiction(model, roles[model], recorded))
    for model, partner in zip(models, reversed(models), strict=True):
        partner_role = explicit.get(partner)
        if roles[model] is None and partner_role is not None:
            roles[model] = OTHER[partner_role]
    missing = [str(model) for model in models if roles[model] is None]
    if missing:
        raise RainError(
            f"no role for {' and '.join(missing)}: put `parameters: {{role: instruct}}` or "
            f"`{{role: pretrained}}` under the model (the calibration was made with "
            f"{_list(recorded)})"
        )
    result = {str(role): model for model, role in roles.items()}
    if len(result) != len(models):
        both = " and ".join(str(model) for model in models)
        raise RainError(
            f"{both} have the same role {next(iter(result))}: one must be `role: instruct`, the "
            f"other `role: pretrained` (the calibration was made with {_list(recorded)})"
        )
    return result


def is_proxy(references: Mapping[str, str]) -> bool:
    """Whether the reasoning model stands for the pretrained one, from the references by role."""
    return references["pretrained"] == references["reasoning"]


def proxy_roles(
    model: Hashable, explicit: str | None, recorded: Mapping[str, str], method: str
) -> dict[str, Hashable]:
    """The roles where the reasoning model stands for the pretrained one too.

    Args:
        model: the one model besides the base model.
        explicit: its configured role, or None.
        recorded: the model reference that the calibration recorded for each of the three roles.
        method: the merge method, for the message.

    Raises:
        RainError: the calibration was made with a pretrained model of its own, or `model` has the
            role of one.
    """
    if not is_proxy(recorded):
        raise RainError(
            f"merge_method: {method} merges exactly two models into base_model, one with "
            f"`role: instruct` and one with `role: pretrained`; found 1: {model} (the calibration "
            f"was made with {_list(recorded)})"
        )
    if explicit == "pretrained":
        raise RainError(_contradiction(model, explicit, recorded))
    return {"instruct": model}


def _recorded_role(model: Hashable, recorded: Mapping[str, str]) -> str | None:
    matches = [role for role in OTHER if recorded[role] == str(model)]
    return matches[0] if len(matches) == 1 else None


def _contradiction(model: Hashable, role: str | None, recorded: Mapping[str, str]) -> str:
    return (
        f"{model} has the role {role}, but the calibration was made with {_list(recorded)}: the "
        "two models are swapped; correct the roles, or calibrate again with these"
    )


def _list(recorded: Mapping[str, str]) -> str:
    return ", ".join(f"{role} = {recorded[role]}" for role in OTHER)

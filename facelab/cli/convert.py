# SPDX-License-Identifier: Apache-2.0
"""convert_checkpoint, and opening whatever file a user starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from facelab.cli.common import OneLineCommand, friendly

FOREIGN = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".json", ".npz")  # endings by which no folder is meant
SELF_CONTAINED = ("eg3d", "stylesdf", "cnerf")  # methods whose files hold averages and everything a configuration needs


@dataclass(frozen=True)
class Source:
    """A generator from any file: ours, or an original one.

    Attributes:
        method: its method.
        model: the ``model`` section of its configuration.
        weights: {"generator": ..., "ema": ..., "d_image": ...} in our names.
        meta: for export: configuration and origin.
        notes: what was found, for the user.
        config: the whole configuration, as plain dicts; empty where the file says no more than ``model``.
    """

    method: str
    model: dict[str, Any]
    weights: dict[str, dict]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_any(path: str | Path, ema: str | Path | None = None) -> Source:
    """Open a facelab checkpoint, a bundled model's name or an original generator file.

    Args:
        ema: the original's averages; default: ``ema.pth`` or ``<step>_ema.pth`` beside the generator.

    Raises:
        UserError: unreadable, refused (code in a pickle), or not a generator.
    """
    from facelab.api import check_finite, locate
    from facelab.checkpoints.format import load_checkpoint
    from facelab.config import to_dict

    found = locate(path)
    if not found.is_file() or found.suffix == ".safetensors":
        checkpoint = load_checkpoint(found, with_state=False)
        for weights in checkpoint.weights.values():
            check_finite(path, weights)
        config: dict[str, Any] = dict(checkpoint.meta["config"])  # type: ignore[call-overload]
        meta = {**checkpoint.meta, "step": checkpoint.step}
        return Source(str(meta["method"]), dict(config["model"]), checkpoint.weights, meta, config=config)
    original = read_foreign(found, ema=None if ema is None else Path(ema))
    config = to_dict(original.config) if original.method in SELF_CONTAINED else {}
    return Source(original.method, original.model, original.weights, original.meta, original.notes, config)


def read_foreign(
    path: Path, method: str = "auto", ema: Path | None = None, use_ema: bool = True, curriculum: str | None = None
) -> Any:
    """A file of an original program, converted: ``method``, ``model``, ``weights``, ``meta``, ``notes``.

    Args:
        method: name, or ``auto``: by what the file holds.
        ema: averages in a file of their own (pi-GAN, FENeRF).
        use_ema: False leaves averages out.
        curriculum: whose cameras and rendering a pi-GAN or FENeRF model keeps; None: by its class.

    Raises:
        UserError: refused, damaged, of another method, or an option that this kind of file does not have.
    """
    from facelab.checkpoints.legacy_networks import is_network_tree
    from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
    from facelab.errors import UserError

    tree = read_pickle_checkpoint(path) if method in ("auto", *SELF_CONTAINED) else None
    read = None
    if method == "eg3d" or (method == "auto" and (is_network_tree(tree) or _is_facednerf(tree))):
        from facelab.methods.facednerf.convert import read_original as read  # EG3D's own, and what FaceDNeRF made of it
    elif method == "stylesdf" or (method == "auto" and _is_stylesdf(tree)):
        from facelab.bases.stylesdf.convert import read_original as read
    elif method == "cnerf" or (method == "auto" and _is_cnerf(tree)):
        from facelab.methods.cnerf.convert import read_original as read
    if read is not None:
        if ema is not None or curriculum is not None:
            raise UserError(f"{path} holds its averages and settings; leave out --ema and --curriculum")
        original = read(path, tree)
        if use_ema:
            return original
        weights = {name: state for name, state in original.weights.items() if not name.endswith("ema")}
        if "generator" not in weights:
            raise UserError(f"{path} holds averages only; leave out --no-ema")
        return dataclasses.replace(original, weights=weights)
    del tree
    from facelab.bases.pigan.originals import read_original

    return read_original(path, ema, use_ema=use_ema, curriculum=curriculum)


def _is_stylesdf(tree: object) -> bool:
    from facelab.bases.stylesdf.convert import is_stylesdf

    return is_stylesdf(tree)


def _is_facednerf(tree: object) -> bool:
    from facelab.methods.facednerf.convert import is_weights_file

    return is_weights_file(tree)


def _is_cnerf(tree: object) -> bool:
    from facelab.methods.cnerf.convert import is_cnerf

    return is_cnerf(tree)


def full_config(method: str, model: Mapping[str, Any], curriculum: str) -> dict[str, Any]:
    """A whole configuration: that of a curriculum's last stage, with this ``model`` section."""
    from facelab.config import load_staged, resolve_curriculum, to_dict
    from facelab.methods import load_config_type

    overrides = [f"model.{key}={value}" for key, value in model.items() if value is not None]
    staged = load_staged(load_config_type(method), [resolve_curriculum(method, curriculum)], overrides)
    return to_dict(staged.stages[-1])


class Initialised:
    """A trainable method whose first weights come from a file; everything else is the method's own."""

    def __init__(self, method: Any, path: Path, fresh_discriminators: bool) -> None:
        self._method, self._path, self._fresh = method, path, fresh_discriminators

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def stages(self, config: Any) -> list[Any]:
        return [dataclasses.replace(stage, init_from=self.fill) for stage in self._method.stages(config)]

    def fill(self, models: Any) -> None:
        """Load the generator (averaged weights where there are any) and, if wanted, the discriminators."""
        from facelab.errors import UserError

        source = open_any(self._path)
        best = next((source.weights[k] for k in ("ema", "generator") if k in source.weights), None)
        if best is None:
            raise UserError(
                f"{self._path} holds no generator to start from, only {', '.join(sorted(source.weights)) or 'nothing'}; take "
                "a run folder or an exported model"
            )
        loaded = {"generator": best}
        if not self._fresh:
            loaded |= {name: source.weights[name] for name in models if name in source.weights and name != "generator"}
        for name, state in loaded.items():
            state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
            try:
                models[name].load_state_dict(state)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise UserError(
                    f"{self._path}: the weights of '{name}' do not fit this configuration ({reason}); "
                    "use the same model and discriminator settings, or --fresh-discriminators"
                ) from error
        if not getattr(self._method, "running_averages", False):  # those that training keeps up to date stay
            models["generator"].forget_averages()


def _require_writable(out: Path) -> None:
    """UserError where neither OUT nor the folders on the way to it can be made; makes nothing."""
    import errno
    import os

    from facelab.errors import UserError
    from facelab.files import describe_os_error, make_folder

    named = out.suffix == ".safetensors"
    if named and out.is_dir():
        raise UserError(describe_os_error(OSError(errno.EISDIR, "a folder"), out))
    folder = (out.parent if named else out).absolute()
    make_folder(next(place for place in (folder, *folder.parents) if os.path.lexists(place)))


def _refuse_own(source: Path) -> None:
    """UserError for what needs no conversion, and for folders."""
    from facelab.api import locate
    from facelab.checkpoints.format import INDEX, list_checkpoints
    from facelab.errors import UserError

    if source.is_dir():
        if (source / INDEX).is_file() or list_checkpoints(source):
            raise UserError(
                f"{source} is a run of facelab, expected a file of an original program; it needs no conversion, every "
                f"command takes it as it is; for one file of it: python scripts/export_model.py {source} OUT"
            )
        raise UserError(f"{source} is a folder, expected a file of an original program; name the file in it")
    found = locate(source)
    if found.suffix == ".safetensors" and found.is_file():
        raise UserError(
            f"{found} is a .safetensors file, expected a .pth, .pt or .pkl of an original program; a model of facelab "
            "needs no conversion"
        )


@click.command("convert_checkpoint", cls=OneLineCommand)
@click.argument("method", metavar="METHOD", type=click.Choice(["auto", "pigan", "fenerf", *SELF_CONTAINED]))
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--ema",
    type=click.Path(path_type=Path),
    default=None,
    help="pi-GAN, FENeRF: the averages' file. [default: ema.pth or STEP_ema.pth beside SOURCE]",
)
@click.option("--no-ema", is_flag=True, help="Convert the live weights although averages lie beside them.")
@click.option(
    "--curriculum",
    default=None,
    help="pi-GAN, FENeRF: curriculum whose camera and rendering settings the model keeps. [default: by the field's class]",
)
@friendly
def convert_checkpoint(
    method: str, source: Path, out: Path, ema: Path | None, no_ema: bool, curriculum: str | None
) -> None:
    """Convert the original checkpoint SOURCE to a .safetensors model OUT (a name, or a folder to put it in).

    METHOD is fenerf or pigan (generator.pth, with ema.pth), eg3d (a .pkl of G, D and G_ema), stylesdf or cnerf (a
    .pt of g_ema) or auto (as the file says). No code of the file runs. The architecture is checked against the shapes
    of its tensors and printed.
    """
    import json

    from facelab.checkpoints.format import atomic_write, export_model
    from facelab.config import to_dict
    from facelab.errors import UserError, an

    if ema is not None and no_ema:
        raise UserError(
            f"--no-ema leaves averages out and --ema {ema} names them, expected one of them; drop the other"
        )
    if out.suffix.lower() in FOREIGN and not out.is_dir():
        raise UserError(f"{out}: expected a name that ends in .safetensors, or a folder, got {out.suffix}; rename it")
    _refuse_own(source)
    _require_writable(out)  # before a file of gigabytes is read
    original = read_foreign(source, method, ema, not no_ema, curriculum)
    if method not in ("auto", original.method):
        raise UserError(
            f"{source} is {an(original.method)} generator, not {method}; say 'convert_checkpoint {original.method} ...' or auto"
        )
    for note in original.notes:
        click.echo(note)
    target = out if out.suffix == ".safetensors" else out / f"{original.method}.safetensors"
    if original.method in SELF_CONTAINED:
        config = to_dict(original.config)
    else:
        config = full_config(original.method, original.model, original.meta["curriculum"])
    export_model(target, original.weights, {**original.meta, "config": config})
    if original.method in SELF_CONTAINED:
        with atomic_write(target.with_suffix(".json")) as temporary:
            text = json.dumps({"config": config, "origin": original.meta["origin"]}, indent=1, sort_keys=True)
            Path(temporary).write_text(text + "\n", encoding="utf-8")
        click.echo(f"configuration: {target.with_suffix('.json')}")
    click.echo(f"written: {target}")

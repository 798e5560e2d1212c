"""The search space: what is on offer at every site, as items. Pure; computes from shapes and names.

A space names its variants once for all layers; a layer takes those that it can have (one with experts no ``narrow``, a
dense one no ``experts``, one with a window no wider one). ``layers`` narrows single layers further. With ``pairs`` the
attention and the FFN of a layer are chosen together: every combination is one item over both sites (coupled BLD,
Puzzle section 2.2); it needs ``layers`` to stay affordable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from puzzle.config import FusionFile
from puzzle.types import AttentionSpec, ConfigError, Conflict, FfnSpec, Item, ModelShape, Part, Site, Spec
from puzzle.variants import (
    fused_item,
    keep_spec,
    layer_item,
    parse_variant,
    resolve,
    run_item,
    shape_id,
    site_item,
    variant_name,
)

PARTS: tuple[Part, Part] = ("attention", "ffn")


@dataclass(frozen=True)
class SearchSpace:
    """``on_offer``: at every site the resolved specs, the teacher's own first; ``runs``: see config.SpaceFile.

    ``fused``: the items of runs whose FFNs are fused.
    """

    on_offer: Mapping[Site, tuple[Spec, ...]] = field(hash=False)
    pairs: bool = False
    runs: int = 0
    fused: tuple[Item, ...] = ()

    @classmethod
    def parse(
        cls,
        names: Mapping[Part, Sequence[str]],
        shape: ModelShape,
        multiple_of: int | None = None,
        layers: Mapping[int, Mapping[Part, Sequence[str]]] | None = None,
        pairs: bool = False,
        runs: int = 0,
        fusion: FusionFile | None = None,
    ) -> SearchSpace:
        """From names; ``gqa-*`` is every proper divisor of the KV heads. Doubles and the full size fall away.

        ``multiple_of`` rounds percentages of the FFN width (default: :func:`hardware_multiple`). ConfigError for what
        no layer can have, and for a layer that the teacher lacks.
        """
        multiple = multiple_of or hardware_multiple(shape.intermediate_size)
        narrowed = layers or {}
        for layer in narrowed:
            if not 0 <= layer < shape.num_layers:
                raise ConfigError(f"layers: the teacher has layers 0 to {shape.num_layers - 1}, not {layer}")
        everywhere = {part: _parsed(part, names[part], shape, multiple) for part in PARTS}
        on_offer: dict[Site, tuple[Spec, ...]] = {}
        for site in shape.sites:
            own = narrowed.get(site.layer, {}).get(site.part)
            specs = everywhere[site.part] if own is None else _parsed(site.part, own, shape, multiple)
            on_offer[site] = _at(site, specs, shape)
        for part in PARTS:
            _check_all_taken(part, everywhere[part], shape)
        if fusion is None:
            return cls(on_offer, pairs, runs)
        if pairs:
            raise ConfigError("fusion: a fused run begins with an FFN, which pairs choose with its attention; drop one")
        ffns = _parsed("ffn", fusion.ffn, shape, multiple)
        return cls(on_offer, pairs, runs, _fused_items(fusion.max_layers, ffns, on_offer, shape))

    def items(self) -> tuple[Item, ...]:
        """Every item, in the order of the sites; runs of layers, then fused ones last."""
        layers = sorted({site.layer for site in self.on_offer})
        lengths = range(2 if self.pairs else 1, self.runs + 1)  # a pair of skips is a run of one
        ends = ((layer, layer + length - 1) for layer in layers for length in lengths)
        runs = [run_item(first, last) for first, last in ends if last < len(layers)]
        if not self.pairs:
            single = (site_item(site, spec) for site, specs in self.on_offer.items() for spec in specs)
            return (*single, *runs, *self.fused)
        pairs = (
            layer_item(layer, attention, ffn)
            for layer in layers
            for attention in self.on_offer[Site(layer, "attention")]
            for ffn in self.on_offer[Site(layer, "ffn")]
            if isinstance(attention, AttentionSpec) and isinstance(ffn, FfnSpec)
        )
        return (*pairs, *runs)

    def conflicts(self) -> tuple[Conflict, ...]:
        """What a run of layers says better: both parts of a layer left out one by one, or two runs that meet."""
        if not self.runs:
            return ()
        offered = {item.id for item in self.items()}
        # by first and last layer; that of one layer may be a pair, or not be there
        runs = {(item.layers[0], item.layers[-1]): item for item in self.items() if _leaves_layers_out(item)}
        found = []
        for (first, last), run in runs.items():
            ways = [tuple(f"{site}.skip" for site in run.sites)] if first == last else []
            for middle in range(first, last):
                if (first, middle) in runs and (middle + 1, last) in runs:
                    ways.append((runs[first, middle].id, runs[middle + 1, last].id))
            found += [Conflict(parts, f"{' and '.join(parts)} are {run.id}") for parts in ways]
        return tuple(conflict for conflict in found if offered.issuperset(conflict.item_ids))

    def items_of(self, architecture: Mapping[str, str]) -> tuple[Item, ...]:
        """The items that an architecture (variant names by site) is made of, but for the teacher's own blocks.

        ConfigError where it names a site or a variant that is not on offer.
        """
        for site, name in architecture.items():
            if site not in map(str, self.on_offer):
                raise ConfigError(f"{site}: the teacher has no such site")
            if name.startswith("fused-"):
                raise ConfigError(
                    f"{site}: one FFN of a fused run cannot be changed alone; give a model without {name}"
                )
        wanted = {site: name for site, name in architecture.items() if name != "keep"}
        chosen: list[Item] = []
        for item in sorted(self.items(), key=lambda item: -len(item.sites)):
            names = {str(site): variant_name(spec) for site, spec in item.at.items()}
            changed = {site for site, name in names.items() if name != "keep"}
            if changed and architecture.items() >= names.items() and changed <= wanted.keys():
                chosen.append(item)
                wanted = {site: name for site, name in wanted.items() if site not in names}
        for site, name in wanted.items():
            raise ConfigError(f"{site}: {name} is not on offer in the search space")
        return tuple(chosen)


def _leaves_layers_out(item: Item) -> bool:
    """Whether it covers whole layers, and nothing of them is left."""
    return len(item.sites) > 1 and all(spec.kind == "skip" for spec in item.specs)


def hardware_multiple(width: int) -> int:
    """What part of a ``width`` is rounded to by default: tensor cores and runtimes like 256, small models 64 or 8."""
    return 256 if width >= 4096 else 64 if width >= 1024 else 8


def _parsed(part: Part, names: Iterable[str], shape: ModelShape, multiple_of: int) -> list[Spec]:
    expanded = [
        name if name != "gqa-*" else f"gqa-{count}"
        for name in names
        for count in (_proper_divisors(shape.num_kv_heads) if name == "gqa-*" else (0,))
    ]
    return [parse_variant(part, name, shape, multiple_of) for name in expanded]


def _at(site: Site, specs: Iterable[Spec], shape: ModelShape) -> tuple[Spec, ...]:
    """The teacher's own first, then each different shape once."""
    keep = keep_spec(shape, site)
    by_shape: dict[str, Spec] = {}
    for spec in specs:
        resolved = resolve(spec, shape, site.layer)
        if resolved is not None:
            by_shape.setdefault(shape_id(resolved, shape), resolved)
    by_shape.pop(shape_id(keep, shape), None)
    return (keep, *by_shape.values())


def _fused_items(
    max_layers: int, ffns: Sequence[Spec], on_offer: Mapping[Site, tuple[Spec, ...]], shape: ModelShape
) -> tuple[Item, ...]:
    """One item per run and FFN; layers with experts are in none, nor those at which the FFN is not on offer."""
    if shape.post_norms:
        raise ConfigError("fusion: norms after the FFNs, which this teacher has, leave no sum to fuse; take it out")
    layers, found = range(shape.num_layers), list[Item]()
    for ffn in ffns:
        if not isinstance(ffn, FfnSpec) or ffn.kind not in ("keep", "narrow"):
            raise ConfigError(f"fusion: {variant_name(ffn)} cannot be fused; allowed: keep, narrow-N")
        able = [layer not in shape.moe_layers and ffn in on_offer[Site(layer, "ffn")] for layer in layers]
        ends = [(first, last) for first in layers for last in layers[first + 1 : first + max_layers]]
        fused = [fused_item(first, last, ffn, shape) for first, last in ends if all(able[first : last + 1])]
        if not fused:
            raise ConfigError(
                f"fusion: {variant_name(ffn)} is on offer in no two consecutive layers without experts; add it to ffn, "
                "or take it out of fusion"
            )
        found += fused
    return tuple(found)


def _check_all_taken(part: Part, specs: Iterable[Spec], shape: ModelShape) -> None:
    for spec in specs:
        if all(resolve(spec, shape, layer) is None for layer in range(shape.num_layers)):
            raise ConfigError(f"{variant_name(spec)}: no layer of the teacher can have this {part}; leave it out")


def _proper_divisors(number: int) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(number // 2, 0, -1) if number % divisor == 0)

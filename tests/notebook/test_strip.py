"""The strip of layers: what is drawn, and how large."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from puzzle.notebook.strip import svg
from puzzle.report.layers import Block, Layer, layers_of
from puzzle.types import FfnSpec, ModelShape
from puzzle.variants import fused_item, keep_spec, params, parse_variant, site_item
from tests.search.search_factories import make_shape

KEEP = Layer(Block("keep", 1.0), Block("keep", 1.0))
LESS = Layer(Block("gqa-2", 0.5), Block("skip", 0.0))


def bars(drawing: str, kind: str) -> list[tuple[float, float]]:
    """Widths and heights of the bars of attention or FFNs, in the order of the layers."""
    found = re.findall(rf'width="([\d.]+)" height="([\d.]+)" class="{kind}"', drawing)
    return [(float(width), float(height)) for width, height in found]


def shape_of_two() -> ModelShape:
    return make_shape(num_layers=2)


def test_bars_are_as_high_as_the_share_of_the_teachers_parameters() -> None:
    shape = shape_of_two()
    names = ("gqa-2", "narrow-48", "keep", "skip")
    items = [
        site_item(site, parse_variant(site.part, name, shape)) for site, name in zip(shape.sites, names, strict=True)
    ]
    layers = layers_of(shape, items)
    keep = keep_spec(shape, shape.sites[1])
    assert layers[0].ffn == Block("narrow-48", params(FfnSpec("narrow", 48), shape) / params(keep, shape))
    drawing = svg(layers, "architecture")
    (_, less), (_, whole) = bars(drawing, "attention")
    assert less == pytest.approx(layers[0].attention.share * whole, abs=0.06)
    assert [high for _, high in bars(drawing, "ffn")] == [pytest.approx(layers[0].ffn.share * whole, abs=0.06), 0.0]


def test_a_fused_ffn_is_drawn_over_the_layers_that_it_stands_for() -> None:
    shape = shape_of_two()
    first = site_item(shape.sites[0], keep_spec(shape, shape.sites[0]))
    layers = layers_of(shape, [first, fused_item(0, 1, FfnSpec("keep"), shape)])
    assert (layers[0].ffn.layers, layers[1].ffn.name) == (2, "skip")
    (wide, high), (narrow, none) = bars(svg(layers, ""), "ffn")
    assert wide > 2 * narrow
    assert high <= bars(svg(layers, ""), "attention")[0][1]
    assert none == 0


@pytest.mark.parametrize("num_layers", [1, 12, 200])
def test_any_number_of_layers_fits_the_page(num_layers: int) -> None:
    drawing = svg([LESS] * num_layers, "architecture")
    root = ElementTree.fromstring(drawing)
    width = float(root.attrib["viewBox"].split()[2])
    rects = list(root.iter("rect"))
    assert len(rects) == 4 * num_layers
    assert all(float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width for rect in rects)
    assert min(float(rect.attrib["width"]) for rect in rects) > 2
    numbers = [text for text in root.iter("text") if (text.text or "").isdigit()]
    places = [float(text.attrib["x"]) for text in numbers]
    assert all(after - before >= 24 for before, after in zip(places, places[1:], strict=False))
    assert f"{num_layers} layers; attention {num_layers} gqa-2; FFN {num_layers} skip" in root.attrib["aria-label"]


def test_what_differs_is_outlined_and_text_is_escaped() -> None:
    drawing = svg([KEEP, LESS], "<b>", other=[KEEP, KEEP])
    assert drawing.count('class="site differs"') == 2
    assert svg([KEEP], "same", other=[KEEP]).count("differs") == 0
    assert "&lt;b&gt;" in drawing
    assert "<b>" not in drawing

"""The page of made-up runs: complete in itself, well-formed whatever is in it or missing, small, always the same."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
from matplotlib.colors import to_hex

from puzzle import style
from puzzle.report.contents import Comparison, Contents
from puzzle.report.front import in_order
from puzzle.report.layers import Block, Layer
from puzzle.report.page import page
from puzzle.report.searched import Absent, Search, Trade
from puzzle.report.table import Table
from puzzle.search.compare import Compared
from tests.report.pages import contents_of, unfinished, without_answer

VOID = {"meta", "link", "br", "img"}
NASTY = """</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;'`"""


class Document(HTMLParser):
    """Every element closed by its own end; ``text`` by the id of the nearest element that has one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or (self.open[-1][1] if self.open else "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        name = self.open[-1][1] if self.open else ""
        self.text[name] = self.text.get(name, "") + data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def contents() -> Contents:
    return contents_of(8)


def trade_of(contents: Contents) -> Trade:
    assert isinstance(contents.search, Search) and isinstance(contents.search.trade, Trade)
    return contents.search.trade


def test_a_page_loads_nothing_and_runs_its_own_script_only(contents: Contents) -> None:
    text = page(contents)
    document = Document(text)
    assert all(value.startswith("#") or value == "data:," for value in document.values("href"))
    assert not document.values("src") and not re.search(r"https?:|//cdn|url\(|@import", text)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    (policy,) = (value for value in document.values("content") if "default-src 'none'" in value)
    assert f"script-src 'sha256-{digest}'" in policy
    assert page(contents) == text


def test_every_part_is_told_to_those_who_do_not_see_it(contents: Contents) -> None:
    document = Document(page(contents))
    charts = [value for tag, name, value in document.attributes if (tag, name) == ("svg", "class")]
    assert document.tags["desc"] == len(charts) > 9
    assert document.values("role").count("radio") == len(in_order(trade_of(contents)))
    assert document.values("tabindex").count("0") == 1  # one stop of the keyboard; arrows go on from there
    tables = {value for tag, name, value in document.attributes if (tag, name) == ("table", "id")}
    assert set(document.values("data-cells")) == tables
    assert document.values("aria-labelledby") == [
        f"{name}-h" for name in re.findall(r'<section id="([\w-]+)"', page(contents))
    ]


def test_whatever_a_name_holds_stays_text(contents: Contents) -> None:
    search = contents.search
    assert (
        isinstance(search, Search)
        and not isinstance(contents.layers, Absent)
        and not isinstance(contents.compared, Absent)
    )
    trade = trade_of(contents)
    trade = replace(
        trade,
        cost_name=NASTY, cost_unit=NASTY, objective_name=NASTY, limits=((NASTY, trade.points[3].cost),),
        told=((NASTY, NASTY),), blocks=tuple(replace(block, name=NASTY) for block in trade.blocks),
        points=tuple(replace(point, broken=(NASTY,)) for point in trade.points),
    )  # fmt: skip
    maps = tuple(replace(one, part=NASTY, variants=(NASTY, *one.variants[1:])) for one in search.maps)
    reached = tuple(replace(one, written=NASTY, unit=NASTY) for one in search.reached)
    table = Table((NASTY, NASTY), ((NASTY, NASTY),), NASTY)
    nasty = replace(
        contents,
        title=NASTY, subtitle=NASTY, search=Search(reached, trade, maps), standings=table, exports=(NASTY,),
        layers=tuple(Layer(Block(NASTY, 1.0), Block(NASTY, 1.0)) for _ in contents.layers),
        trained=tuple(replace(one, part=NASTY, variant=NASTY) for one in contents.trained),
        compared=Comparison(NASTY, (Compared(NASTY, objective=1.0, totals={NASTY: 1.0}), Compared(NASTY, note=NASTY))),
        steps=Absent(NASTY), recipe=replace(contents.recipe, files=((NASTY, NASTY),) * 2, versions=((NASTY, NASTY),)),
    )  # fmt: skip
    document = Document(page(nasty))
    assert document.tags["script"] == 2 and document.tags["img"] == 0
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]
    data = json.loads(document.text["data"])
    assert data["blocks"][0][0] == NASTY and NASTY in data["points"][0]["said"]
    assert document.text["reproduce"].count(NASTY) > 4
    assert any(NASTY in value for value in document.values("aria-label"))


def test_the_strip_and_what_the_script_draws_it_from_agree(contents: Contents) -> None:
    text = page(contents)
    data = json.loads(Document(text).text["data"])
    assert data["points"][data["chosen"]]["said"].startswith("Chosen: ")
    bars = re.findall(
        r'data-site="(\d+)"><title>([^<]+)</title><rect [^>]+/>'
        r'<rect [^>]*y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" class="(\w+)"/></g>',
        text,
    )
    assert len(bars) == 16
    sizes, blocks = data["strip"], data["points"][data["chosen"]]["blocks"]
    for site, told, y, width, height, kind in bars:
        _, words, wide, high = data["blocks"][blocks[int(site)]]
        assert kind == ("ffn" if int(site) % 2 else "attention") and told.endswith(f": {words}")
        assert (float(width), float(height)) == (wide, high)
        assert float(y) == pytest.approx(sizes["bottom"] if int(site) % 2 else sizes["top"] - float(height), abs=0.11)


def test_a_point_names_a_limit_that_it_keeps(contents: Contents) -> None:
    data = json.loads(Document(page(contents)).text["data"])
    for told, point in zip(data["points"], in_order(trade_of(contents)), strict=True):
        limit = float(re.fullmatch(r"constraints: \{params: (.+)\}", told["get"])[1])  # type: ignore[index]
        assert point.cost <= limit <= point.cost * (1 + 1e-6)


def test_200_layers_are_less_than_two_megabytes() -> None:
    text = page(contents_of(200, variants=3))
    assert len(text.encode()) < 2_000_000
    assert Document(text).values("data-site").count("399") == 1


@pytest.mark.parametrize("num_layers", [1, 2, 33])
def test_any_depth_is_drawn(num_layers: int) -> None:
    document = Document(page(contents_of(num_layers)))
    assert len(document.values("data-site")) == 2 * num_layers
    assert not [value for value in document.values("d") if "nan" in value or "inf" in value]


def test_a_front_of_one_point_is_drawn() -> None:
    contents = contents_of(3, variants=1)
    assert len(trade_of(contents).points) == 1
    document = Document(page(contents))
    assert "Only one architecture" in document.text["what-fits"]
    assert not [value for value in document.values("d") if "nan" in value]


def test_what_is_missing_is_told_with_the_command_that_makes_it(contents: Contents) -> None:
    document = Document(page(unfinished(contents)))
    told = " ".join(document.text.values())
    assert "score: 4 of 16 missing" in told and "search: 1 of 1 stale" in told and "puzzle search RUN --redo" in told
    assert "not there yet; run puzzle score RUN" in document.text["what-fits"]
    assert json.loads(document.text["data"]) is None and document.tags["svg"] == 0
    assert "run: runs/demo" in told


def test_limits_that_nothing_keeps_still_have_a_front() -> None:
    contents = without_answer(4)
    document = Document(page(contents))
    data = json.loads(document.text["data"])
    assert data["chosen"] is None and all("breaks params" in point["said"] for point in data["points"])
    assert len(document.values("data-site")) == 8  # the layers of the point that is picked at first
    no_front = replace(contents, search=replace(contents.search, trade=Absent("no choice of items")))  # type: ignore[type-var]
    assert "no choice of items" in Document(page(no_front)).text["what-fits"]


def test_a_pruning_has_no_search(contents: Contents) -> None:
    pruned = replace(contents, search=None, trained=None, compared=None, standings=None)
    document = Document(page(pruned))
    assert not {"what-fits", "choices", "limits", "baselines"} & set(document.values("id"))
    assert len(document.values("data-site")) == 16 and "curve" in document.values("id")


def test_of_a_teacher_that_is_not_on_offer_nothing_is_predicted(contents: Contents) -> None:
    assert not isinstance(contents.summary, Absent)
    predicted = {"teacher": {}, "student": contents.summary.predicted["student"]}
    text = page(replace(contents, summary=replace(contents.summary, predicted=predicted)))
    assert '<th scope="row">chat.memory_gib, predicted</th><td></td><td></td><td>' in text
    assert "chat.memory_gib" in page(contents) and "<dt>chat.memory_gib</dt>" not in text


def test_steps_of_the_palette_are_the_scale_of_all_figures() -> None:
    last = len(style.SCALE_STEPS) - 1
    colours = [to_hex(matplotlib.colormaps[style.SCALE](step / last)) for step in range(last + 1)]
    assert list(style.SCALE_STEPS) == colours

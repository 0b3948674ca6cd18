"""The page of `hardmoe serve` in a real browser: upload, hashtag search, keyboard alone, a telephone's width."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Page, browser
from support import copied_run, invoke, real_images
from test_serving import LIMITS, serving

from hardmoe.mixture import Mixture
from hardmoe.searching.search import SearchIndex
from hardmoe.serving.app import Service
from hardmoe.serving.engine import LocalEngine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def mixture(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    root = copied_run(finished, tmp_path_factory.mktemp("page"))
    assert invoke(root, "index", "--root", str(root)).returncode == 0
    return Mixture.load(str(root))


@pytest.fixture(scope="module")
def url(mixture: Mixture) -> Iterator[str]:
    index = SearchIndex.open(mixture.store.storage.where(), mixture)
    with serving(Service(mixture, LocalEngine(mixture), index, LIMITS, token="secret")) as port:
        yield f"http://127.0.0.1:{port}/#token=secret"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image.png").write_bytes(real_images(100)[7].image)
    return tmp_path / "image.png"


def fits(page: Page) -> bool:
    return bool(page.run("document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.mark.parametrize("width", [1200, 390])
def test_image_that_is_given_shows_tags_expert_and_neighbours(
    page: Page, url: str, image: Path, mixture: Mixture, width: int, tmp_path: Path
) -> None:
    page.open("about:blank", width)
    page.open(url, width)
    page.choose("#file", image)
    page.wait("document.querySelectorAll('#neighbours img').length === 12")
    expected = mixture.predict([image], k=8)[0]
    assert page.run("[...document.querySelectorAll('.tag')].map(each => each.textContent)") == [f"#{t}" for t in expected.tags]
    assert f"expert {expected.expert}" in page.run("document.getElementById('expert').textContent")
    assert page.run("document.querySelectorAll('#typical img').length") > 0
    page.wait("[...document.images].every(each => each.loading === 'lazy' || (each.complete && each.naturalWidth > 0))")
    assert fits(page), "something is wider than the screen"
    page.screenshot(tmp_path / f"image-{width}.png")
    assert page.errors == []


def test_hashtag_is_searched_by_the_keyboard_alone(page: Page, url: str, mixture: Mixture, tmp_path: Path) -> None:
    page.open("about:blank", 390)
    page.open(url, 390)
    for expected in ("file", "tag"):
        page.press("Tab", 9)
        assert page.run("document.activeElement.id") == expected
    page.call("Input.insertText", text=f"#{mixture.tags[0]}")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('#neighbours img').length === 24")
    assert page.run("document.getElementById('say').textContent") == "24 images" and fits(page)
    page.screenshot(tmp_path / "tag.png")


def test_mistakes_are_told_on_the_page(page: Page, url: str, tmp_path: Path) -> None:
    page.open("about:blank", 800)
    page.open(url, 800)
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.choose("#file", tmp_path / "broken.png")
    page.wait("document.getElementById('say').className === 'bad'")
    assert "not an image" in page.run("document.getElementById('say').textContent")
    page.open("about:blank", 800)
    page.open(url.partition("#")[0], 800)
    page.run("searchTag('anything')")
    page.wait("document.getElementById('say').textContent.includes('Authorization')")

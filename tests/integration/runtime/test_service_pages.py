"""The pages a service shows of itself: without a key, without the internet, without secrets."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx2
import msgspec
import pytest
from generate import SERVICES

from contract.examples import CONTRACTS
from invoicing.__main__ import SERVICE as INVOICING
from ledger.__main__ import SERVICE as LEDGER
from metering.__main__ import SERVICE as METERING
from runtime.service import NOWHERE, Service, make_app, make_kit

OF_NAME = {service.name: service for service in (METERING, LEDGER, INVOICING)}


def client_of(service: Service) -> httpx2.AsyncClient:
    """A client of a service that is connected to nothing."""
    kit = make_kit(service, NOWHERE)
    app = make_app(service, kit, service.build(kit))
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://t")


class Loads(HTMLParser):
    """What a browser would load for a page, and where its links go."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "href" and tag == "a":
                self.linked.append(value or "")
            elif name in {"src", "href", "action", "style"} or name.startswith("on"):
                self.loaded.append(f"{tag} {name}={value}")
            elif name == "id":
                self.ids.append(value or "")
        if tag in {"script", "iframe", "object", "form", "link", "base"}:
            self.loaded.append(tag)


@pytest.mark.parametrize("service", SERVICES)
async def test_docs_show_every_endpoint_and_load_nothing(service: str) -> None:
    """Each operation, each model, links that lead somewhere, and a policy that allows no more."""
    async with client_of(OF_NAME[service]) as client:
        answer = await client.get("/docs")
        served = await client.get("/openapi.json")
    committed = (CONTRACTS / "openapi" / f"{service}.json").read_bytes()
    assert (200, committed) == (served.status_code, served.content)
    document = msgspec.json.decode(committed)
    page = Loads(answer.text)
    assert [] == page.loaded
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    names = [o["operationId"] for item in document["paths"].values() for o in item.values()]
    models = [f"model-{name}" for name in document["components"]["schemas"]]
    assert sorted([*names, *models]) == sorted(page.ids)
    inside = {link[1:] for link in page.linked if link.startswith("#")}
    assert set() == inside - set(page.ids)
    assert {"/openapi.json"} == {link for link in page.linked if not link.startswith("#")}


@pytest.mark.parametrize("service", SERVICES)
async def test_the_front_page_says_what_it_is_and_where_to_go(service: str) -> None:
    """A page for browsers, JSON for others; every place it names is there."""
    async with client_of(OF_NAME[service]) as client:
        told = (await client.get("/")).json()
        page = await client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
        assert service == told["service"]
        assert told["purpose"].endswith(".")
        assert told["purpose"] in page.text
        links = Loads(page.text).linked
        assert {told["docs"], told["openapi"], told["status"]} <= set(links)
        for link in set(links) - {"/readyz"}:
            wanted = 401 if link.startswith("/v1/") else 200
            assert wanted == (await client.get(link)).status_code, link


@pytest.mark.parametrize("service", SERVICES)
async def test_pages_need_no_key_and_take_no_other_method(service: str) -> None:
    """Reading is all there is to do with them."""
    async with client_of(OF_NAME[service]) as client:
        for path in ("/", "/docs", "/openapi.json"):
            assert 200 == (await client.get(path)).status_code
            assert 405 == (await client.post(path)).status_code
        text = (await client.get("/docs")).text
    assert [] == re.findall(r"https?://|hsb_|postgresql:", text)

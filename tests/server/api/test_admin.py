"""Management's routes and their gate, in front of a double of what manages."""

import asyncio
import hmac
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import httpx
import pytest

from server.api import admin
from server.api.admin import AdminGate
from server.api.errors import ApiError
from server.api.resources import NETWORKS_PATH, NetworkInfo, Overview
from server.settings import key_digest
from tests.server.management import (
    LOADING,
    Manager,
    application,
    load_info,
    network_info,
    overview,
    settings_of,
)
from value_models.manifest import NAME_PATTERN

QA = f"{NETWORKS_PATH}/qa"
ADMIN_KEY, CLIENT_KEY = "sesame-öffne", "clients-own"
BEARER = {"authorization": f"Bearer {ADMIN_KEY}".encode()}
FORM = "application/x-www-form-urlencoded"


class Server:
    """Management behind its gate, as vLLM would serve it, for one kind of peer."""

    def __init__(self, manager: Manager, **settings: Any) -> None:
        self.manager = manager
        self.app = application(manager, **settings)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask from this machine, unless `client` or `server` (as in ASGI's scope) say otherwise."""
        return asking(self.app, method, path, **options)


def asking(
    app: Any,
    method: str,
    path: str,
    *,
    client: tuple[str, int] | None = ("127.0.0.1", 4321),
    server: tuple[str, int | None] | None = ("127.0.0.1", 8000),
    host: str = "127.0.0.1:8000",
    **options: Any,
) -> httpx.Response:
    async def placed(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "client": client, "server": server}, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(placed)
        async with httpx.AsyncClient(transport=transport) as http:
            return await http.request(method, f"http://{host}{path}", **options)

    return asyncio.run(ask())


def with_keys() -> dict[str, Any]:
    return {
        "admin_key_digest": key_digest(ADMIN_KEY),
        "client_key_digests": (key_digest("another"), key_digest(CLIENT_KEY)),
    }


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def server(manager: Manager) -> Server:
    return Server(manager)


@pytest.fixture
def locked(manager: Manager) -> Server:
    return Server(manager, **with_keys())


def assert_refused(response: httpx.Response, code: int, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (code, code), error
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


class TestRoutes:
    def test_overview(self, server: Server) -> None:
        response = server.ask("GET", NETWORKS_PATH)
        assert response.status_code == 200
        assert Overview.model_validate(response.json()) == overview(network_info())

    @pytest.mark.parametrize("reference", ["qa", "qa@3f2a91c0", "a.b-c_1"])
    def test_describe(self, server: Server, reference: str) -> None:
        response = server.ask("GET", f"{NETWORKS_PATH}/{reference}")
        assert response.status_code == 200
        assert NetworkInfo.model_validate(response.json()) == server.manager.answer
        assert server.manager.calls == [("describe", reference)]

    def test_a_load_is_accepted(self, server: Server) -> None:
        server.manager.answer = LOADING
        response = server.ask("PUT", QA, json={"source": "qa-2026-11"})
        assert (response.status_code, response.headers["location"]) == (202, QA)
        assert NetworkInfo.model_validate(response.json()) == LOADING
        ((call, name, source, _),) = server.manager.calls
        assert (call, name, source) == ("load", "qa", "qa-2026-11")

    def test_a_replacement_is_accepted_while_the_old_version_serves(self, server: Server) -> None:
        server.manager.answer = network_info(load=load_info())
        response = server.ask("PUT", QA)
        assert (response.status_code, response.json()["state"]) == (202, "ready")

    def test_a_load_that_ended_is_no_promise(self, server: Server) -> None:
        response = server.ask("PUT", QA)
        assert response.status_code == 200 and "location" not in response.headers

    def test_the_location_is_below_the_root_path(self, server: Server) -> None:
        server.manager.answer = LOADING
        server.app.root_path = "/llm"
        assert server.ask("PUT", f"/llm{QA}").headers["location"] == f"/llm{QA}"

    @pytest.mark.parametrize("body", [b"", b"  \n", b"{}", b'{"source": null}'])
    def test_the_source_may_be_left_out(self, server: Server, body: bytes) -> None:
        assert server.ask("PUT", QA, content=body).status_code == 200
        assert server.manager.calls[0][:3] == ("load", "qa", None)

    @pytest.mark.parametrize(
        "content_type", ["application/json", "Application/JSON; charset=utf-8", FORM]
    )
    def test_json_that_curl_calls_a_form_is_json(self, server: Server, content_type: str) -> None:
        headers = {"content-type": content_type}
        response = server.ask("PUT", QA, content='{"source": "b"}', headers=headers)
        assert response.status_code == 200
        assert server.manager.calls[0][2] == "b"

    @pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x"])
    def test_other_content_types_are_refused(self, server: Server, content_type: str) -> None:
        headers = {"content-type": content_type}
        response = server.ask("PUT", QA, content="{}", headers=headers)
        assert_refused(response, 415, "application/json")
        assert not server.manager.calls

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            (b"{", "EOF"),
            (b"source=qa", "source"),
            (b"[]", "object"),
            (b"null", "object"),
            (b'{"source": 5}', "string"),
            (b'{"source": "qa", "force": true}', "force"),
            (b'{"source": "' + b"x" * 65 + b'"}', "64"),
            (b'{"source": "\xff"}', "source"),
            (b'{"source": ' + b"[" * 20000 + b"]" * 20000 + b"}", "source"),
        ],
    )
    def test_other_bodies_are_refused(self, server: Server, body: bytes, word: str) -> None:
        assert_refused(server.ask("PUT", QA, content=body), 400, word)
        assert not server.manager.calls

    @pytest.mark.parametrize("source", ["", "..", "../qa", "/etc", "a/b", ".qa", "qa@3f2a91c0"])
    def test_a_source_is_no_path(self, server: Server, source: str) -> None:
        response = server.ask("PUT", QA, json={"source": source})
        assert_refused(response, 400, NAME_PATTERN)
        assert response.json()["error"]["param"] == "source"
        assert not server.manager.calls

    def test_streamed_bodies_are_counted(self, server: Server) -> None:
        read = 0

        async def chunks() -> Any:
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b" " * 1024

        assert_refused(server.ask("PUT", QA, content=chunks()), 413, "65536")
        assert read < 100

    @pytest.mark.parametrize(
        "name",
        [
            "%2E%2E",
            ".x",
            "-x",
            "a%20b",
            "a%2Fb",
            "a/b",
            "..%2F..%2Fetc",
            "x" * 65,
            "%C3%A4",
            "@",
            "",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    def test_a_name_that_is_none_is_told_the_rule(
        self, server: Server, method: str, name: str
    ) -> None:
        assert_refused(server.ask(method, f"{NETWORKS_PATH}/{name}"), 400, NAME_PATTERN)
        assert not server.manager.calls

    def test_a_version_cannot_be_chosen(self, server: Server) -> None:
        response = server.ask("PUT", f"{QA}@3f2a91c0")
        assert_refused(response, 400, NAME_PATTERN, "cannot be chosen")

    @pytest.mark.parametrize("version", ["", "3F2A91C0", "3f2a91c", "3f2a91c00", "3f2a91c0@1"])
    def test_a_version_that_is_none_is_refused(self, server: Server, version: str) -> None:
        assert_refused(server.ask("GET", f"{QA}@{version}"), 400, NAME_PATTERN)

    def test_unloading_goes_on(self, server: Server) -> None:
        server.manager.answer = network_info(state="draining", version=None)
        response = server.ask("DELETE", f"{QA}@3f2a91c0")
        assert (response.status_code, response.json()["state"]) == (202, "draining")
        assert server.manager.calls[0][:3] == ("unload", "qa@3f2a91c0", False)

    def test_unloading_may_end_at_once(self, server: Server) -> None:
        server.manager.answer = None
        response = server.ask("DELETE", QA)
        assert (response.status_code, response.content) == (204, b"")

    @pytest.mark.parametrize(("said", "meant"), [("true", True), ("1", True), ("false", False)])
    def test_from_store(self, server: Server, said: str, meant: bool) -> None:
        assert server.ask("DELETE", f"{QA}?from_store={said}").status_code == 202
        assert server.manager.calls[0][2] is meant

    def test_from_store_is_yes_or_no(self, server: Server) -> None:
        assert_refused(server.ask("DELETE", f"{QA}?from_store=perhaps"), 400, "from_store")
        assert not server.manager.calls

    def test_a_version_cannot_be_deleted_from_the_store(self, server: Server) -> None:
        response = server.ask("DELETE", f"{QA}@3f2a91c0?from_store=true")
        assert_refused(response, 400, "from_store")
        assert not server.manager.calls

    @pytest.mark.parametrize("status", [400, 404, 409, 503, 507])
    @pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
    def test_refusals_reach_the_operator(self, server: Server, method: str, status: int) -> None:
        server.manager.error = ApiError(HTTPStatus(status), "because", headers={"Retry-After": "2"})
        response = server.ask(method, QA)
        assert_refused(response, status, "because")
        assert response.headers["retry-after"] == "2"

    def test_other_methods_and_paths(self, server: Server) -> None:
        assert server.ask("POST", QA, json={}).status_code == 405
        assert server.ask("PUT", NETWORKS_PATH, json={}).status_code == 405
        assert server.ask("GET", "/admin").status_code == 404

    def test_a_request_keeps_its_id(self, server: Server) -> None:
        server.ask("PUT", QA, headers={"x-request-id": "deploy-17.a"})
        server.ask("DELETE", QA, headers={"x-request-id": "deploy-18"})
        assert [call[3] for call in server.manager.calls] == ["deploy-17.a", "deploy-18"]

    @pytest.mark.parametrize("given", [None, "", "a state=ready", "x" * 65, "é"])
    def test_an_id_that_would_garble_the_log_is_replaced(
        self, server: Server, given: str | None
    ) -> None:
        headers = {} if given is None else {"x-request-id": given.encode()}
        server.ask("PUT", QA, headers=headers)
        server.ask("PUT", QA, headers=headers)
        first, second = (call[3] for call in server.manager.calls)
        assert first != second and first.isalnum() and len(first) == 32


class TestDocument:
    @pytest.fixture(scope="class")
    def document(self) -> dict[str, Any]:
        return Server(Manager()).app.openapi()

    @pytest.mark.parametrize(
        ("method", "path", "statuses"),
        [
            ("get", NETWORKS_PATH, "200 401 403 503 4XX"),
            ("get", f"{NETWORKS_PATH}/{{reference}}", "200 400 401 403 404 503 4XX"),
            (
                "put",
                f"{NETWORKS_PATH}/{{reference}}",
                "200 202 400 401 403 404 409 413 415 503 507 4XX",
            ),
            ("delete", f"{NETWORKS_PATH}/{{reference}}", "202 204 400 401 403 404 409 503 4XX"),
        ],
    )
    def test_every_answer_is_documented(
        self, document: dict[str, Any], method: str, path: str, statuses: str
    ) -> None:
        responses = document["paths"][path][method]["responses"]
        assert set(responses) == set(statuses.split())
        for status, response in responses.items():
            assert response["description"]
            if status != "204":
                schema = response["content"]["application/json"]["schema"]["$ref"]
                expected = "ErrorBody" if status[0] in "45" else ("NetworkInfo", "Overview")
                assert schema.rpartition("/")[2] in expected

    def test_names_have_their_pattern(self, document: dict[str, Any]) -> None:
        one = document["paths"][f"{NETWORKS_PATH}/{{reference}}"]
        patterns = {m: one[m]["parameters"][0]["schema"]["pattern"] for m in one}
        assert patterns["put"] == f"^{NAME_PATTERN}$"
        assert patterns["get"] == patterns["delete"] == f"^{NAME_PATTERN}(@[0-9a-f]{{8}})?$"

    def test_the_body_may_be_left_out(self, document: dict[str, Any]) -> None:
        body = document["paths"][f"{NETWORKS_PATH}/{{reference}}"]["put"]["requestBody"]
        assert not body["required"]
        schema = body["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False and set(schema["properties"]) == {"source"}


PATHS = (
    NETWORKS_PATH,
    f"{NETWORKS_PATH}/",
    QA,
    "/admin",
    "/admin/",
    "/admin/nothing",
    "/scale_elastic_ep",
    "/%61dmin/value_networks",
    "/Admin/value_networks",
    "//admin/value_networks",
    "/./admin/value_networks",
    "/v1/..%2Fadmin/value_networks",
    "/admin;x=1/value_networks",
    "/admin%20/value_networks",
    "/%5Cadmin/value_networks",
    "/admin%2F..%2F..%2Fv1",
    f"{NETWORKS_PATH}/..%2F..%2F..%2Fv1%2Fmodels",
)


class TestKey:
    """Who may, where the server has an admin key."""

    @pytest.mark.parametrize("path", PATHS)
    def test_no_key_is_401_everywhere(self, locked: Server, path: str) -> None:
        for method in ("GET", "PUT", "DELETE", "POST", "OPTIONS", "FOO"):
            response = locked.ask(method, path)
            assert_refused(response, 401, "Authorization: Bearer")
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert locked.ask("HEAD", path).status_code == 401
        assert not locked.manager.calls

    @pytest.mark.parametrize(
        "header",
        [b"", b"Bearer", b"Bearer  ", ADMIN_KEY.encode(), b"Basic " + ADMIN_KEY.encode(), b"\xff"],
    )
    def test_other_credentials_are_none(self, locked: Server, header: bytes) -> None:
        assert_refused(locked.ask("GET", QA, headers={"authorization": header}), 401)

    def test_two_keys_are_none(self, locked: Server) -> None:
        headers = [("authorization", b"Bearer x"), ("authorization", BEARER["authorization"])]
        assert_refused(locked.ask("GET", QA, headers=headers), 401)

    @pytest.mark.parametrize("path", PATHS)
    def test_a_clients_key_is_403_everywhere(self, locked: Server, path: str) -> None:
        headers = {"authorization": f"Bearer {CLIENT_KEY}"}
        for method in ("GET", "PUT", "DELETE", "POST"):
            assert_refused(locked.ask(method, path, headers=headers), 403, "client's key")
        assert not locked.manager.calls

    @pytest.mark.parametrize("key", [ADMIN_KEY[:-1], ADMIN_KEY + "x", ADMIN_KEY.upper(), "x"])
    def test_another_key_is_403(self, locked: Server, key: str) -> None:
        headers = {"authorization": f"Bearer {key}".encode()}
        response = locked.ask("GET", QA, headers=headers)
        assert_refused(response, 403, "not the server's admin key")
        assert key not in response.text

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER  "])
    def test_the_admin_key_opens_from_anywhere(self, locked: Server, scheme: str) -> None:
        headers = {
            "authorization": f"{scheme} {ADMIN_KEY}".encode(),
            "origin": "https://console.example",
            "x-forwarded-for": "203.0.113.5",
        }
        response = locked.ask("GET", QA, headers=headers, client=("203.0.113.5", 1), host="llm")
        assert response.status_code == 200

    def test_what_does_not_exist_is_told_to_operators_only(self, locked: Server) -> None:
        assert locked.ask("GET", "/admin/nothing", headers=BEARER).status_code == 404
        assert locked.ask("POST", QA, headers=BEARER).status_code == 405

    def test_a_client_key_that_is_the_admin_key_opens_nothing(self, manager: Manager) -> None:
        keys = {"admin_key_digest": key_digest("x"), "client_key_digests": (key_digest("x"),)}
        response = Server(manager, **keys).ask("GET", QA, headers={"authorization": "Bearer x"})
        assert_refused(response, 403, "client's key")

    def test_keys_are_compared_in_constant_time(
        self, locked: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared = []

        def compare(a: Any, b: Any) -> bool:
            compared.append((a, b))
            return a == b

        monkeypatch.setattr(admin.hmac, "compare_digest", compare)
        assert locked.ask("GET", QA, headers=BEARER).status_code == 200
        given = key_digest(ADMIN_KEY)
        keys = with_keys()
        assert compared == [(given, digest) for digest in (*keys["client_key_digests"], given)]
        assert hmac.compare_digest is compare  # the gate's only comparison

    @pytest.mark.parametrize(
        "path", ["/v1/models", "/administration", "/metrics", "/", "/v1/admin"]
    )
    def test_other_paths_are_not_guarded(self, locked: Server, path: str) -> None:
        assert locked.ask("GET", path).status_code == 404

    @pytest.mark.parametrize("path", ["/llm/admin/value_networks", NETWORKS_PATH])
    def test_a_root_path_hides_nothing(self, locked: Server, path: str) -> None:
        locked.app.root_path = "/llm"
        assert_refused(locked.ask("GET", path), 401)
        assert locked.ask("GET", path, headers=BEARER).status_code == 200

    def test_a_root_path_of_that_name_guards_no_more(self, locked: Server) -> None:
        locked.app.root_path = "/admin"
        assert locked.ask("GET", "/admin/v1/models").status_code == 404
        assert locked.ask("GET", "/admin/admin/value_networks").status_code == 401

    def test_the_body_of_a_stranger_is_not_read(self, locked: Server) -> None:
        async def chunks() -> Any:
            raise AssertionError("the body was read")
            yield b""

        assert_refused(locked.ask("PUT", QA, content=chunks()), 401)

    async def test_a_websocket_is_closed(self) -> None:
        sent: list[Any] = []

        async def app(*_: Any) -> None:
            raise AssertionError("the gate let it pass")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/admin/x", "headers": []}
        await AdminGate(app, settings=settings_of(**with_keys()))(scope, Any, send)  # type: ignore[arg-type]
        assert [message["type"] for message in sent] == ["websocket.close"]


def strangers() -> Iterator[Any]:
    """Requests that do not come straight from this machine, and what the refusal names."""
    for host in ("203.0.113.5", "172.17.0.1", "0.0.0.0", "::ffff:203.0.113.5", "fe80::1", "x", ""):
        yield pytest.param({"client": (host, 1)}, "other machines", id=f"peer {host}")
    # uvicorn's word for a peer that has reset its connection.
    yield pytest.param({"client": None}, "other machines", id="peer without address")
    yield pytest.param({"client": None, "server": None}, "other machines", id="nothing known")
    for name in ("Origin", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "Via", "X-Real-IP"):
        for value in ("http://127.0.0.1:8000", "127.0.0.1", ""):
            yield pytest.param({"headers": {name: value}}, name.lower(), id=f"{name}: {value}")
    for site in ("cross-site", "same-site", "same-origin"):
        yield pytest.param({"headers": {"Sec-Fetch-Site": site}}, "sec-fetch-site", id=site)
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "llm", "0.0.0.0:8000", "[::2]:1"):
        yield pytest.param({"host": host}, "host name", id=f"Host: {host}")
    for key in (CLIENT_KEY, "x"):
        yield pytest.param({"headers": {"authorization": f"Bearer {key}"}}, "with a key", id=key)


class TestThisMachine:
    """Who may, where the server has no admin key."""

    @pytest.mark.parametrize(("request_", "word"), strangers())
    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    def test_strangers_are_told_what_to_set(
        self, manager: Manager, method: str, request_: dict[str, Any], word: str
    ) -> None:
        server = Server(manager, client_key_digests=(key_digest(CLIENT_KEY),))
        response = server.ask(method, QA, **request_)
        assert_refused(response, 403, "--admin-api-key", "TRIMTAB_ADMIN_API_KEY")
        assert word in response.json()["error"]["message"].lower()
        assert not manager.calls

    @pytest.mark.parametrize("path", PATHS)
    def test_everywhere(self, server: Server, path: str) -> None:
        assert_refused(server.ask("GET", path, client=("203.0.113.5", 1)), 403)

    @pytest.mark.parametrize(
        ("client", "host"),
        [
            ("127.0.0.1", "127.0.0.1:8000"),
            ("127.0.0.1", "localhost:8000"),
            ("127.0.0.1", "LocalHost"),
            ("127.1.2.3", "127.0.0.1"),
            ("::1", "[::1]:8000"),
            ("::ffff:127.0.0.1", "127.0.0.1:8000"),
        ],
    )
    def test_loopback_is_this_machine(self, server: Server, client: str, host: str) -> None:
        assert server.ask("PUT", QA, client=(client, 1), host=host).status_code == 200

    def test_a_unix_socket_is_this_machine(self, server: Server) -> None:
        socket = ("/run/trimtab.sock", None)
        assert server.ask("PUT", QA, client=None, server=socket, host="x").status_code == 200

    def test_a_proxy_before_a_unix_socket_is_not(self, server: Server) -> None:
        socket = ("/run/trimtab.sock", None)
        headers = {"x-forwarded-for": "203.0.113.5"}
        response = server.ask("PUT", QA, client=None, server=socket, headers=headers)
        assert_refused(response, 403)

    def test_a_typed_address_is_no_web_page(self, server: Server) -> None:
        assert server.ask("GET", QA, headers={"sec-fetch-site": "none"}).status_code == 200

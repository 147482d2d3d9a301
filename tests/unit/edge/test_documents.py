"""What the server says of itself: its settings and its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.api_keys import line_for, new_key
from server.settings import Settings
from tests.unit.edge.application import CLASSIFY, Runner, Site

# It must fit the body, whatever the body is.
NO_EXAMPLE = "Inference-Header-Content-Length"


async def openapi(site: Site) -> dict[str, Any]:
    document: dict[str, Any] = (await site.ask("GET", "/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def test_the_effective_settings_have_what_was_left_to_the_machine(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        settings = (await site.ask("GET", "/v1/settings")).json()
        assert settings.keys() == Settings.model_fields.keys()
        assert (settings["max_queue"], settings["max_pixels"]) == (7, 10_000), "as they were set"
        assert (settings["engine"], settings["device"], settings["num_threads"]) == ("fake", "none", 1)
        assert settings["max_batch"] == 4
        assert settings["checkpoint"].endswith("scala-xs-tiny-imagenet")
        assert settings["profile_dir"].endswith("scala-serve")
        assert settings["tls_key_password"] is None

    site(scenario, max_queue=7)


def test_secrets_are_masked(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.ask("GET", "/v1/settings")
        assert reply.json()["tls_key_password"] == "**********"
        assert b"hunter2" not in reply.body

    site(scenario, tls_cert="c", tls_key="k", tls_key_password="hunter2")


def test_every_answer_and_header_is_documented_with_an_example(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        document = await openapi(site)
        for path, operation in operations(document):
            for parameter in operation["parameters"]:
                needed = {"description"} if parameter["name"] == NO_EXAMPLE else {"description", "example"}
                assert needed <= parameter.keys(), (path, parameter["name"])
            for status, answer in operation["responses"].items():
                assert answer["headers"].keys() >= {"X-Request-Id"}, (path, status)
                for header in answer["headers"].values():
                    assert {"description", "example", "schema"} <= header.keys(), (path, status)
                assert all({"example", "examples"} & content.keys() for content in answer["content"].values()), path
                for media_type, content in answer["content"].items() if int(status) >= 400 else ():
                    values = [example["value"] for example in content.get("examples", {}).values()]
                    if path.startswith("/v2"):
                        assert content["schema"] == {"$ref": "#/components/schemas/Error"}, path
                        assert all(value.keys() == {"error"} for value in values), path
                    elif media_type == "application/problem+json":
                        assert all(value["status"] == int(status) for value in values), path
        answers = document["paths"][CLASSIFY]["post"]["responses"]
        assert answers.keys() == {"200", "400", "413", "415", "422", "429", "500", "503", "504"}
        assert answers["200"]["headers"].keys() >= {"X-Scala-Width", "X-Budget-Met", "Server-Timing"}
        assert all("Retry-After" in answers[status]["headers"] for status in ("429", "503"))

    site(scenario)


def test_the_document_knows_the_model(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        document = await openapi(site)
        parameters = {each["name"]: each for each in document["paths"][CLASSIFY]["post"]["parameters"]}
        assert parameters["top_k"]["schema"]["maximum"] == 200
        assert parameters["X-Width"]["schema"]["enum"] == [0.25, 0.5, 0.75, 1.0]
        name, version, *_ = document["paths"]["/v2/models/{model}/versions/{version}/infer"]["post"]["parameters"]
        assert (name["name"], name["schema"]["enum"], name["example"]) == ("model", ["toy"], "toy")
        assert (version["name"], version["schema"]["enum"]) == ("version", ["1"])
        assert document == await openapi(site), "asked again"

    site(scenario)


def test_the_document_of_one_server_leaves_nothing_in_that_of_the_next(site: Runner, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_for("alice", new_key()))
    documents = []

    async def scenario(site: Site) -> None:
        documents.append(await openapi(site))

    site(scenario)
    site(scenario, api_keys_file=tmp_path / "keys")
    site(scenario)
    before, with_keys, after = documents
    assert before == after != with_keys
    for path, operation in operations(after):
        names = [parameter["name"] for parameter in operation["parameters"]]
        assert len(set(names)) == len(names), path
        assert "security" not in operation, path


def test_keys_are_documented_where_they_are_asked_for(site: Runner, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_for("alice", new_key()))

    async def scenario(site: Site) -> None:
        document = await openapi(site)
        assert document["components"]["securitySchemes"] == {"apiKey": {"type": "http", "scheme": "bearer"}}
        for path, operation in operations(document):
            asks = path not in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
            assert ("security" in operation) is asks, path
            assert ({"401", "403", "429"} <= operation["responses"].keys()) is asks, path
            form = "application/json" if path.startswith("/v2") else "application/problem+json"
            for status in ("401", "403", "429") if asks else ():
                assert operation["responses"][status]["content"].keys() == {form}, path

    site(scenario, api_keys_file=tmp_path / "keys")


def test_every_reference_leads_somewhere(site: Runner) -> None:
    def references(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else ())
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    async def scenario(site: Site) -> None:
        document = await openapi(site)
        found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
        assert found <= document["components"]["schemas"].keys()
        assert {"Problem", "Images", "Classification", "Classifications"} <= found

    site(scenario)

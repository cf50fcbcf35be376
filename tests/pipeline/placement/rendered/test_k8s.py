"""What a cluster is given: objects that it takes, of which each names what is there, no more."""

import copy
import ipaddress
import subprocess
from functools import cache
from itertools import product

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from pipeline.agreement.manifest import build_manifest, load_manifest, parse_manifest
from pipeline.cli import stage_worker
from pipeline.errors import InputError
from pipeline.placement.rendered.k8s.cluster import CONTROL_PORT, DATA_PORT, HEALTH_PORT
from pipeline.placement.rendered.k8s.rendering import render, write
from pipeline.placement.rendered.stage_needs import MIB, StageNeeds
from tests.pipeline.placement.rendered import leaderworkerset
from transport.relay import parse_map

KINDS = ("leaderworkerset", "statefulset", "enclaves")
# Where any name will do, so that only what it stands for can be wrong.
FREE = {"labels", "matchLabels", "nodeSelector", "data", "requests", "limits", "selector"}
REFUSALS = (kubernetes_validate.ValidationError, jsonschema.ValidationError)
# Read for each object anew, they would be most of the work.
SCHEMAS = cache(kubernetes_validate.utils.schema_contents)


@pytest.fixture
def rendered(cluster, keyed, attested, needs):
    """All objects for a kind of cluster."""

    def run(kind, **changes):
        manifest = attested if kind == "enclaves" else keyed
        found = render(manifest, cluster(kind, **changes), needs)
        return [each for objects in found.values() for each in objects]

    return run


@pytest.fixture(autouse=True)
def _schemas_are_read_once(monkeypatch):
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", SCHEMAS)


def validate(found):
    """Raises one of REFUSALS for what the cluster's API would."""
    if found.get("kind") == "LeaderWorkerSet":
        leaderworkerset.validate(found)
        core = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": found["metadata"]}
        for template in leaderworkerset.templates(found):
            validate(core | {"template": template})
        return
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(found, version, strict=True)


def templates(objects):
    """Every pod's template, with the labels that its pods have."""
    for each in objects:
        if each["kind"] == "StatefulSet":
            yield each["spec"]["template"]
        elif each["kind"] == "LeaderWorkerSet":
            size = each["spec"]["leaderWorkerTemplate"]["size"]
            leader, worker = leaderworkerset.templates(each)
            for idx, template in enumerate([leader, *[worker] * (size - 1)]):
                pod = copy.deepcopy(template)
                index = {"leaderworkerset.sigs.k8s.io/worker-index": str(idx)}
                pod["metadata"]["labels"] |= index
                yield pod


def of_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


def is_selected(selector, labels):
    return selector.items() <= labels.items()


def selected(selector, objects):
    """The stages that a selector means."""
    pods = enumerate(templates(objects))
    return [idx for idx, pod in pods if is_selected(selector, pod["metadata"]["labels"])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_takes_all_of_it(rendered, kind):
    objects = rendered(kind, secret="variables", pull_secret="registry", networks=("10.0.0.0/8",))
    for each in objects:
        validate(each)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    workload = "LeaderWorkerSet" if kind == "leaderworkerset" else "StatefulSet"
    assert {each["kind"] for each in objects} == {
        "ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", workload
    }  # fmt: skip


def renamed(found, path=()):
    """The object with one name misspelt, once for each place that is not free to be anything."""
    for name, value in found.items():
        if name not in FREE:
            yield (*path, name), [*path, name]
            inner = value if isinstance(value, dict) else {}
            yield from renamed(inner, (*path, name))
            if isinstance(value, list) and value and isinstance(value[0], dict):
                yield from renamed(value[0], (*path, name, 0))


def misspelt(found, path):
    copied = copy.deepcopy(found)
    *parents, last = path
    where = copied
    for each in parents:
        where = where[each]
    where[last + "x"] = where.pop(last)
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_a_typo_in_any_kind_of_object_is_caught(rendered, kind):
    seen = set()
    for each in rendered(kind):
        for path, _ in renamed(each):
            # One of a kind: containers and ports are alike.
            key = (each["kind"], path[-1], len(path))
            if key in seen:
                continue
            seen.add(key)
            with pytest.raises((*REFUSALS, KeyError)):
                validate(misspelt(each, path))
    assert {"spec", "ports", "readinessProbe", "resources"} <= {name for _, name, _ in seen}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("restartPolicy",), "Never"),
        (("size",), 0),
        (("size",), "3"),
        (("workerTemplate", "spec", "containers"), {}),
        (("workerTemplate", "spec", "enableServiceLinks"), "no"),
    ],
)
def test_a_value_of_another_kind_is_caught_in_a_set_of_workers(rendered, path, value):
    (found,) = of_kind(rendered("leaderworkerset"), "LeaderWorkerSet")
    where = found["spec"]["leaderWorkerTemplate"]
    for each in path[:-1]:
        where = where[each]
    where[path[-1]] = value
    with pytest.raises(REFUSALS):
        validate(found)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_pod_names_is_there(rendered, kind):
    objects = rendered(kind)
    configs = {each["metadata"]["name"] for each in of_kind(objects, "ConfigMap")}
    for pod in templates(objects):
        spec = pod["spec"]
        volumes = {each["name"]: each for each in spec["volumes"]}
        mounted = {m["name"] for c in spec["containers"] for m in c.get("volumeMounts", ())}
        assert mounted == volumes.keys()
        named = {each["configMap"]["name"] for each in volumes.values() if "configMap" in each}
        assert named <= configs
        for container in spec["containers"]:
            ports = {each["name"] for each in container.get("ports", ())}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                action = container.get(probe, {})
                for how in ("httpGet", "tcpSocket"):
                    assert how not in action or action[how]["port"] in ports


@pytest.mark.parametrize("kind", KINDS)
def test_each_service_and_policy_means_one_stage_and_the_budget_all(rendered, kind):
    objects = rendered(kind)
    services = of_kind(objects, "Service")
    assert [selected(each["spec"]["selector"], objects) for each in services] == [[0], [1], [2]]
    assert {each["spec"]["clusterIP"] for each in services} == {"None"}
    policies = [each["spec"]["podSelector"] for each in of_kind(objects, "NetworkPolicy")]
    assert [selected(each["matchLabels"], objects) for each in policies] == [[0], [1], [2]]
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    assert selected(budget["spec"]["selector"]["matchLabels"], objects) == [0, 1, 2]
    assert budget["spec"]["maxUnavailable"] == 1
    for each in of_kind(objects, "StatefulSet"):
        own = each["spec"]["selector"]["matchLabels"]
        assert is_selected(own, each["spec"]["template"]["metadata"]["labels"])
        assert each["spec"]["serviceName"] in {s["metadata"]["name"] for s in services}


def may_pass(objects, source, target, port, names):
    """Whether both ends' policies let a pod of these names connect to another's port."""
    policies = of_kind(objects, "NetworkPolicy")

    def allows(own, other, rules, side):
        mine = [p["spec"] for p in policies
                if is_selected(p["spec"]["podSelector"]["matchLabels"], names[own])]  # fmt: skip
        return not mine or any(
            {"protocol": "TCP", "port": port} in rule["ports"]
            and any(
                is_selected(peer["podSelector"]["matchLabels"], names[other])
                for peer in rule[side]
                if "podSelector" in peer and "namespaceSelector" not in peer
            )
            for spec in mine
            for rule in spec[rules]
        )

    return allows(target, source, "ingress", "from") and allows(source, target, "egress", "to")


@pytest.mark.parametrize("kind", KINDS)
def test_the_links_of_the_manifest_are_open_and_no_others(rendered, cluster, kind):
    objects = rendered(kind)
    names = {idx: pod["metadata"]["labels"] for idx, pod in enumerate(templates(objects))}
    names |= {"home": cluster(kind).orchestrator_labels, "other": {"app": "other"}}
    names["foreign"] = cluster(kind).labels | {"app.kubernetes.io/instance": "another"}
    ports = (CONTROL_PORT, DATA_PORT, HEALTH_PORT, 22)
    found = {
        (source, target, port)
        for source, target, port in product(names, range(3), ports)
        if source != target and may_pass(objects, source, target, port, names)
    }
    assert found == {
        ("home", 0, CONTROL_PORT), ("home", 1, CONTROL_PORT), ("home", 2, CONTROL_PORT),
        ("home", 0, DATA_PORT), (0, 1, DATA_PORT), (1, 2, DATA_PORT),
        ("home", 2, DATA_PORT),  # for results
    }  # fmt: skip
    for each in of_kind(objects, "NetworkPolicy"):
        assert each["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_networks_of_orchestrators_are_let_in_where_orchestrators_are(rendered):
    for each in of_kind(rendered("statefulset", networks=("10.0.0.0/8",)), "NetworkPolicy"):
        blocks = [peer["ipBlock"]["cidr"] for rule in each["spec"]["ingress"]
                  for peer in rule["from"] if "ipBlock" in peer]  # fmt: skip
        assert blocks == ["10.0.0.0/8"]
        assert ipaddress.ip_network(blocks[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_container_can_change_its_files_or_become_another_user(rendered, kind):
    for pod in templates(rendered(kind)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert not spec["automountServiceAccountToken"]
        kind_of_profile = spec["securityContext"]["seccompProfile"]["type"]
        assert kind_of_profile == ("Localhost" if kind == "enclaves" else "RuntimeDefault")
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            resources = container["resources"]
            assert resources["requests"].keys() == resources["limits"].keys()
            for mount in container.get("volumeMounts", ()):
                is_scratch = mount["name"] in {"tmp", "hugepages", "run", "log"}
                assert mount.get("readOnly", False) is not is_scratch


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_secret_is_in_it_and_secrets_are_named(rendered, kind):
    objects = rendered(kind, secret="variables", pull_secret="registry")
    assert not of_kind(objects, "Secret")
    for pod in templates(objects):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        if kind != "enclaves":
            (container,) = pod["spec"]["containers"]
            assert container["envFrom"] == [{"secretRef": {"name": "variables"}}]
            # A key that the engine had made or carried would be the engine's.
            (keys,) = (v for v in pod["spec"]["volumes"] if v["name"] == "keys")
            assert keys["hostPath"] == {"path": "/var/lib/veilpipe", "type": "Directory"}


@pytest.mark.parametrize("kind", ["leaderworkerset", "statefulset"])
def test_workers_are_told_what_they_know_and_of_which_stage_they_are(rendered, kind):
    known = {name for each in get_command(stage_worker.app).params for name in each.opts}
    for idx, pod in enumerate(templates(rendered(kind))):
        (container,) = pod["spec"]["containers"]
        given = dict(each.partition("=")[::2] for each in container["args"])
        assert given.keys() <= known
        assert given["--health"].endswith(f":{HEALTH_PORT}")
        assert "--dev" not in given
        (variable,) = container["env"]
        assert variable["name"] == "VEILPIPE_STAGE_IDX"
        if kind == "statefulset":
            assert variable["value"] == str(idx)
        parts = [m["subPathExpr"] for m in container["volumeMounts"] if "subPathExpr" in m]
        assert set(parts) == {"stage$(VEILPIPE_STAGE_IDX)"}


def test_each_stage_asks_for_what_it_needs_and_workers_of_a_set_for_the_most(rendered, needs):
    def memory(kind):
        found = [pod["spec"]["containers"][0]["resources"] for pod in templates(rendered(kind))]
        return [(each["requests"]["memory"], each["limits"]["memory"]) for each in found]

    each = [(f"{one.memory_mib}Mi", f"{one.limit_mib}Mi") for one in needs]
    assert memory("statefulset") == each
    assert memory("leaderworkerset") == [each[0], each[2], each[2]]
    for one in needs:
        rest = one.session_bytes + one.step_bytes
        assert one.memory_mib * MIB > one.weight_bytes + rest
        assert one.limit_mib * MIB > one.widest_weight_bytes + rest


def test_what_a_worker_may_take_for_a_session_is_never_less_than_was_reckoned():
    for session in (1, 12345, MIB, 777 * MIB + 1, 3 << 30):
        (flag,) = (f for f in StageNeeds(0, 0, session, 0, 1).worker_flags if "--kv-memory" in f)
        assert float(flag.partition("=")[2]) * (1 << 30) >= session


def test_an_enclave_gets_a_device_huge_pages_and_a_relay_that_leads_to_it(rendered, needs):
    for idx, pod in enumerate(templates(rendered("enclaves", enclave_group=985))):
        launcher, relay = pod["spec"]["containers"]
        limits = launcher["resources"]["limits"]
        assert limits["aws.ec2.nitro/nitro_enclaves"] == "1"
        pages = int(limits["hugepages-2Mi"].removesuffix("Mi"))
        assert pages % 2 == 0
        # The archive, its unpacked copy, and what is computed with.
        weights = 2 * needs[idx].weight_bytes + needs[idx].widest_weight_bytes
        assert pages * MIB > weights + needs[idx].session_bytes
        assert f"--memory {pages}" in launcher["command"][2]
        assert f"--enclave-cid {16 + idx}" in launcher["command"][2]
        assert pod["spec"]["securityContext"]["supplementalGroups"] == [985]
        maps = [parse_map(each.removeprefix("--map="), 8) for each in relay["args"]]
        targets = [str(each.target) for each in maps]
        assert targets[:2] == [f"vsock:{16 + idx}:5000", f"vsock:{16 + idx}:5001"]
        onward = [f"tcp:vp-stage-{idx + 1}.default.svc:{DATA_PORT}"] if idx < 2 else []
        assert targets[2:] == onward


def test_the_launcher_of_an_enclave_is_a_script_that_a_shell_takes(rendered):
    for pod in templates(rendered("enclaves")):
        for container in pod["spec"]["containers"]:
            for command in (
                container["command"],
                container["readinessProbe"].get("exec", {}).get("command", []),
            ):
                if command[:2] == ["/bin/sh", "-c"]:
                    subprocess.run(["/bin/sh", "-n", "-c", command[2]], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_orchestrators_and_workers_have_the_same_core_and_find_each_other(
    cluster, keyed, attested, needs, tmp_path, kind
):
    manifest = attested if kind == "enclaves" else keyed
    written = write(manifest, cluster(kind, namespace="llm"), needs, tmp_path / "out")
    found = load_manifest(tmp_path / "out/orchestrator/manifest.json")
    assert found.core_hash() == manifest.core_hash()
    (config,) = yaml.safe_load_all((tmp_path / "out/manifest.yaml").read_text())
    assert parse_manifest(config["data"]["manifest.json"]) == found
    assert not [path for path in written if "&id" in path.read_text()]
    objects = [each for path in written for each in yaml.safe_load_all(path.read_text())]
    hosts = {f"{each['metadata']['name']}.llm.svc" for each in of_kind(objects, "Service")}
    assert {each.endpoint.control.to_endpoint().host for each in found.stages} == hosts
    assert found.stages[-1].endpoint.data_out is None  # it is dialed for its results
    dialed = [each.endpoint.data_out.to_endpoint() for each in found.stages[:-1]]
    if kind == "enclaves":
        assert [(each.cid, each.port) for each in dialed] == [(3, 6000), (3, 6001)]
    else:
        assert dialed == [each.endpoint.data_in.to_endpoint() for each in found.stages[1:]]
    # What is written is what was rendered, and kubectl reads no other file there.
    again = render(manifest, cluster(kind, namespace="llm"), needs)
    assert objects == [each for name in again for each in again[name]]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        path.name for path in written
    }


def test_enclaves_are_not_put_into_one_set(cluster, attested, needs):
    with pytest.raises(InputError, match="use --kind statefulset"):
        render(attested, cluster("leaderworkerset"), needs)
    with pytest.raises(InputError, match="--enclave-image names an image"):
        render(attested, cluster("statefulset"), needs)


def test_a_pipeline_of_one_stage_is_a_set_of_one(cluster, fields, needs):
    fields |= {"stages": fields["stages"][:1], "total_layers": 1}
    found = render(build_manifest(fields, "test"), cluster(), needs[:1])
    (lws,) = found["workloads"]
    validate(lws)
    assert lws["spec"]["leaderWorkerTemplate"]["size"] == 1

"""What a user may say of a cluster, and which manifests one is given."""

import shlex

import pytest

from pipeline.agreement.manifest import build_manifest
from pipeline.errors import InputError, PolicyError
from pipeline.placement.rendered.k8s.cluster import Cluster
from pipeline.placement.rendered.k8s.rendering import render


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "My_Pipe"}, "--name 'My_Pipe'"),
        ({"name": "1st"}, "--name '1st': give a letter first"),
        ({"name": ""}, "--name ''"),
        ({"name": "a" * 41}, "40 characters at most"),
        ({"name": "a-"}, "--name 'a-'"),
        ({"name": "a\n"}, "--name"),
        ({"namespace": "a.b"}, "--namespace 'a.b'"),
        ({"claim": "Parts"}, "--claim 'Parts'"),
        ({"secret": "a_b"}, "--secret 'a_b'"),
        ({"pull_secret": "x" * 254}, "--pull-secret"),
        ({"kind": "deployment"}, "--kind deployment: use leaderworkerset, statefulset"),
        ({"image": ""}, "--image is empty"),
        ({"image": "a b"}, "--image 'a b'"),
        ({"image": "a@sha256:12"}, "--image"),
        ({"image": "a:b:c"}, "--image 'a:b:c'"),
        ({"image": "a:"}, "--image 'a:'"),
        ({"image": "a:" + "t" * 129}, "--image"),
        ({"image": "registry:port/a"}, "--image 'registry:port/a'"),
        ({"image": "registry/a/"}, "--image 'registry/a/'"),
        ({"image": "registry//a"}, "--image 'registry//a'"),
        ({"image": "registry/A"}, "--image 'registry/A'"),
        ({"image": "registry/a..b"}, "--image 'registry/a..b'"),
        ({"image": "-a/b"}, "--image '-a/b'"),
        ({"image": "a\n"}, "--image"),
        ({"image": "a/" * 127 + "ab"}, "255 characters at most"),
        ({"enclave_image": "a b"}, "--enclave-image 'a b'"),
        ({"enclave_image": "a:b:c"}, "--enclave-image 'a:b:c'"),
        ({"keys_path": "keys"}, "--keys-path 'keys'"),
        ({"keys_path": "/a/../b"}, "--keys-path"),
        ({"enclave_seccomp": "../x"}, "--enclave-seccomp"),
        ({"enclave_seccomp": "a b"}, "--enclave-seccomp"),
        ({"networks": ("10.0.0.1/8",)}, "--orchestrator: 10.0.0.1/8 has host bits set"),
        ({"networks": ("anywhere",)}, "--orchestrator: 'anywhere'"),
    ],
)
def test_names_that_a_cluster_would_not_take_are_one_line(changes, words):
    with pytest.raises(InputError) as caught:
        Cluster(**{"image": "registry/veilpipe:1"} | changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        "veilpipe", "veilpipe:1.2_rc-3", "registry:5000/team/veilpipe", "localhost/a__b-c.d:1",
        "123456789012.dkr.ecr.eu-west-1.amazonaws.com/veilpipe@sha256:" + "a" * 64,
        "[fd00::1]:5000/a:1@sha256:" + "0" * 64, "Registry.example/a",
    ],
)  # fmt: skip
def test_images_are_named_as_registries_name_them(image):
    assert Cluster(image=image).image == image


def test_a_manifest_that_no_cluster_could_hold_is_refused(cluster, fields, needs):
    fields["stages"][0]["weight_hashes"] = ["a" * 64] * 20000
    with pytest.raises(InputError, match="ConfigMap"):
        render(build_manifest(fields, "test"), cluster(), needs)


def test_a_pipelines_name_is_no_word_of_a_shell():
    with pytest.raises(InputError):
        Cluster(image="i", name=shlex.quote("a; reboot"))


def test_what_nobody_could_be_held_to_is_not_placed(cluster, fields, needs):
    del fields["orchestrator_keys"]
    with pytest.raises(PolicyError, match="orchestrator_keys"):
        render(build_manifest(fields, "test"), cluster(), needs)

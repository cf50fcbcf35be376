"""Where stages are found in a cluster, and who reaches them: the links of the manifest, no more."""

from pipeline.placement.rendered.k8s.cluster import (
    CONTROL_PORT,
    DATA_PORT,
    Cluster,
    Objects,
    selector,
)

Rule = dict[str, object]


def services(cluster: Cluster, num_stages: int) -> Objects:
    """A headless one for each stage: its name stands for its pod, once that is ready."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": cluster.metadata(cluster.service(idx)),
            "spec": {
                "clusterIP": "None",
                "selector": cluster.stage_labels(idx),
                "ports": [
                    {"name": "control", "port": CONTROL_PORT, "protocol": "TCP"},
                    {"name": "data", "port": DATA_PORT, "protocol": "TCP"},
                ],
            },
        }
        for idx in range(num_stages)
    ]


def policies(cluster: Cluster, num_stages: int) -> Objects:
    """One for each stage; what it does not name is refused both ways.

    A node's own probes always pass. Attack: a pod of anybody's that fills a stage's lobby.
    """
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": cluster.metadata(cluster.service(idx)),
            "spec": {
                "podSelector": selector(cluster.stage_labels(idx)),
                "policyTypes": ["Ingress", "Egress"],
                "ingress": _ingress(cluster, idx, num_stages),
                "egress": _egress(cluster, idx, num_stages),
            },
        }
        for idx in range(num_stages)
    ]


def _ingress(cluster: Cluster, idx: int, num_stages: int) -> list[Rule]:
    peers: list[Rule] = [{"podSelector": selector(cluster.orchestrator_labels)}]
    peers += [{"ipBlock": {"cidr": str(network)}} for network in cluster.cidrs]
    # Tokens go to the first stage, and results are fetched of the last.
    is_end = idx in {0, num_stages - 1}
    ports = [CONTROL_PORT, DATA_PORT] if is_end else [CONTROL_PORT]
    rules: list[Rule] = [{"from": peers, "ports": _tcp(*ports)}]
    if idx:
        before = {"podSelector": selector(cluster.stage_labels(idx - 1))}
        rules.append({"from": [before], "ports": _tcp(DATA_PORT)})
    return rules


def _egress(cluster: Cluster, idx: int, num_stages: int) -> list[Rule]:
    if idx == num_stages - 1:
        return []
    dns = {
        "namespaceSelector": selector({"kubernetes.io/metadata.name": "kube-system"}),
        "podSelector": selector({"k8s-app": "kube-dns"}),
    }
    behind = {"podSelector": selector(cluster.stage_labels(idx + 1))}
    return [
        {"to": [behind], "ports": _tcp(DATA_PORT)},
        {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)]},
    ]


def _tcp(*ports: int) -> list[dict[str, object]]:
    return [{"protocol": "TCP", "port": port} for port in ports]

"""Pinned measurements that development was told to ignore: whoever looks on is told so."""


def test_a_server_says_so_in_every_line_and_answer(cluster):
    cluster.plan(2)
    cluster.edit(lambda m: m["stages"][1].update(expected_measurements={"0": "ab" * 48}))
    server = cluster.serve("--supervise", "--ignore-measurements")
    assert server.text("Hello there", 3)
    assert [each["ignores_measurements"] for each in server.pipeline()["stages"]] == [False, True]
    shown = cluster.orch_command("top", "--once", "--url", server.url).stdout
    assert "MEASUREMENTS IGNORED" in shown
    assert shown.count("pins ignored") == 1
    lines = server.log().splitlines()
    assert any("event=measurements_ignored" in line and "stage 1's PCR 0" in line for line in lines)
    assert all("measurements=ignored" in line for line in lines)

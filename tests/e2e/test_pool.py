"""More requests than the stages' KV memory holds, on real processes."""

from concurrent.futures import ThreadPoolExecutor

NUM_TOKENS = 220
# As many as run at once begin beside each other, and cannot end so.
PROMPTS = [[10 + index] * 100 for index in range(12)]
# For 2,097 tokens in the stage of two layers.
MEMORY = ("--kv-memory", "0.001")
SEEDED = {"temperature": 0.9, "seed": 11}


def test_requests_give_way_and_a_stage_dies_and_every_text_is_what_it_is_alone(cluster):
    cluster.plan(3)
    for idx in range(3):
        cluster.start_worker(idx, *MEMORY)
    server = cluster.serve("--prefix-share", "0")
    alone = [server.text(prompt, NUM_TOKENS) for prompt in PROMPTS]
    seeded = server.text(PROMPTS[0], NUM_TOKENS, **SEEDED)

    def num_given_way():
        return server.pipeline()["engine"]["num_given_way"]

    def together():
        return server.post(server.wish(PROMPTS, NUM_TOKENS)).json()["choices"]

    assert num_given_way() == 0
    with ThreadPoolExecutor() as pool:
        texts = pool.submit(together)
        another = pool.submit(server.text, PROMPTS[0], NUM_TOKENS, **SEEDED)
        server.wait_for(num_given_way)
        cluster.workers[1].kill()
        cluster.start_worker(1, *MEMORY)
        assert [choice["text"] for choice in texts.result()] == alone
        assert another.result() == seeded
    engine = server.pipeline()["engine"]
    assert (engine["num_running"], engine["num_waiting"], engine["held_tokens"]) == (0, 0, 0)
    assert "veilpipe_requests_given_way_total" in server.get("/metrics").text
    server.stop()

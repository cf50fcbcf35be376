"""The released openai client, called from a thread of its own."""

import openai
import pytest
import trio

KEY = "sk-test-0123456789"
MODEL = "tiny/model"
USER = [{"role": "user", "content": "Hi"}]


async def with_client(gateway, use, key=KEY):
    """Run `use(client)` in a thread, since the client blocks."""

    def run():
        with openai.OpenAI(
            base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=300
        ) as client:
            return use(client)

    return await trio.to_thread.run_sync(run)


async def fails(gateway, error, use, key=KEY):
    with pytest.raises(error) as caught:
        await with_client(gateway, use, key)
    return caught.value

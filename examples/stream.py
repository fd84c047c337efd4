"""Streams one answer: `python examples/stream.py "Why is the sky blue?"`, with `make up` running."""

import sys

import quire


def main() -> None:
    """Runs the example."""
    question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    with quire.Client("127.0.0.1:50051") as client:
        stream = client.stream_chat([{"role": "user", "content": question}], max_tokens=80, temperature=0)
        for text in stream.text():
            print(text, end="", flush=True)
        usage = stream.usage
    if usage is not None:
        print(f"\n{usage.cached_token_count} of {usage.prompt_token_count} prompt tokens were cached")


if __name__ == "__main__":
    main()

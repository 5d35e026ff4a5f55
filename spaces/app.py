"""The page on Hugging Face Spaces, which run this file and say by the environment where it listens."""

from perfmodel.app.page import serve

if __name__ == "__main__":
    serve().block_thread()

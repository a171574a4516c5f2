"""Who writes and scores: models here, llama.cpp, servers."""

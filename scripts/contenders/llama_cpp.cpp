// llama.cpp as a contender: the protocol of protocol.py, spoken by a program of libllama.
//
//   llama_cpp MODEL.gguf THREADS [--plain | RPC_SERVER,RPC_SERVER...]
//
// --plain: weights stay as they are in the file, not repacked for what this CPU says that it has:
// some virtual machines announce AMX and do not have it. `logits FILE ID ID ...` writes those of the
// next token after each, as float32 [tokens, vocabulary].
//
// As llama-bench does, it decodes with the library's defaults; greedy choice is its own loop.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

struct Result {
    std::vector<double> ms;
    std::vector<llama_token> token_ids;
};

std::vector<std::string> buffers;  // where llama.cpp says it put the weights

void on_log(enum ggml_log_level level, const char * text, void *) {
    const std::string line = text;
    if (line.find("model buffer size") != std::string::npos) {
        buffers.push_back(line.substr(line.find(':') + 1));
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::cerr << line;
    }
}

[[noreturn]] void die(const std::string & text) {
    std::cerr << "llama_cpp: " << text << "\n";
    std::exit(1);
}

class Clock {
  public:
    double lap_ms() {
        const auto now = std::chrono::steady_clock::now();
        const double ms = std::chrono::duration<double, std::milli>(now - last_).count();
        last_ = now;
        return ms;
    }

  private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

struct FreeContext {
    void operator()(llama_context * context) const { llama_free(context); }
};
using Context = std::unique_ptr<llama_context, FreeContext>;

Context new_context(llama_model * model, int num_threads, int num_sequences, int positions) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = num_sequences * positions;
    params.n_seq_max = num_sequences;
    params.n_threads = params.n_threads_batch = num_threads;
    params.no_perf = true;
    Context context(llama_init_from_model(model, params));
    if (!context) {
        die("no context of " + std::to_string(num_sequences) + " sequences");
    }
    return context;
}

llama_token argmax(const float * logits, int count) {
    float best = logits[0];
    for (int i = 1; i < count; ++i) {  // one pass the compiler vectorises, one that only looks
        best = logits[i] > best ? logits[i] : best;
    }
    return static_cast<llama_token>(std::find(logits, logits + count, best) - logits);
}

class Contender {
  public:
    Contender(llama_model * model, int num_threads)
        : model_(model), num_threads_(num_threads),
          vocab_size_(llama_vocab_n_tokens(llama_model_get_vocab(model))) {}

    // Of the next token after each of a text, as float32 [tokens, vocabulary] into a file.
    void write_logits(const std::string & path, const std::vector<llama_token> & text) {
        const int length = static_cast<int>(text.size());
        const Context context = new_context(model_, num_threads_, 1, length + 1);
        llama_batch batch = llama_batch_init(length, 0, 1);
        for (int i = 0; i < length; ++i) {
            add(batch, text[i], i, 0, true);
        }
        decode(context.get(), batch);
        std::ofstream file(path, std::ios::binary);
        for (int i = 0; i < length; ++i) {
            const char * row = reinterpret_cast<const char *>(llama_get_logits_ith(context.get(), i));
            file.write(row, static_cast<std::streamsize>(vocab_size_ * sizeof(float)));
        }
        llama_batch_free(batch);
        if (!file.flush()) {
            die("cannot write " + path);
        }
    }

    // One sequence per row of `rows`, all with the same prompt; a time per generated step.
    Result generate(int rows, int steps, const std::vector<llama_token> & prompt) {
        const int positions = llama_model_n_ctx_train(model_);
        Context & slot = rows == 1 ? single_ : many_;
        if (!slot || rows_ != rows) {
            slot = new_context(model_, num_threads_, rows, rows == 1 ? positions : 256);
            rows_ = rows;
        }
        llama_context * context = slot.get();
        llama_memory_clear(llama_get_memory(context), false);
        const int length = static_cast<int>(prompt.size());
        llama_batch batch = llama_batch_init(std::max(length, rows), 0, 1);
        Clock clock;
        for (int row = 0; row < rows; ++row) {
            batch.n_tokens = 0;
            for (int i = 0; i < length; ++i) {
                add(batch, prompt[i], i, row, i == length - 1);
            }
            decode(context, batch);
        }
        Result result;
        std::vector<llama_token> last(rows, argmax(llama_get_logits_ith(context, -1), vocab_size_));
        result.ms.push_back(clock.lap_ms());
        result.token_ids.push_back(last[0]);
        for (int step = 0; step + 1 < steps; ++step) {
            batch.n_tokens = 0;
            for (int row = 0; row < rows; ++row) {
                add(batch, last[row], length + step, row, true);
            }
            decode(context, batch);
            for (int row = 0; row < rows; ++row) {
                last[row] = argmax(llama_get_logits_ith(context, row), vocab_size_);
            }
            result.ms.push_back(clock.lap_ms());
            result.token_ids.push_back(last[0]);
        }
        llama_batch_free(batch);
        return result;
    }

  private:
    static void add(llama_batch & batch, llama_token token, int position, int row, bool want) {
        const int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = row;
        batch.logits[i] = want;
    }

    static void decode(llama_context * context, const llama_batch & batch) {
        if (llama_decode(context, batch) != 0) {
            die("llama_decode failed");
        }
        llama_synchronize(context);
    }

    llama_model * model_;
    int num_threads_;
    int vocab_size_;
    int rows_ = 1;
    Context single_;
    Context many_;
};

void use_servers(const std::string & list) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        die("built without RPC");
    }
    using AddServer = ggml_backend_reg_t (*)(const char *);
    const auto add_server = reinterpret_cast<AddServer>(
        ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
    std::stringstream servers(list);
    for (std::string server; std::getline(servers, server, ',');) {
        ggml_backend_reg_t reg = add_server(server.c_str());
        if (reg == nullptr) {
            die("no server at " + server);
        }
        ggml_backend_register(reg);
    }
}

void print_about() {
    std::string text = "{\"ready\": true, \"about\": \"";
    for (const std::string & buffer : buffers) {
        for (const char c : buffer) {
            text += c == '\n' ? ';' : c;
        }
    }
    std::cout << text << "\"}" << std::endl;
}

void print(const Result & result) {
    std::cout << "{\"ms\": [";
    for (size_t i = 0; i < result.ms.size(); ++i) {
        std::cout << (i ? ", " : "") << result.ms[i];
    }
    std::cout << "], \"token_ids\": [";
    for (size_t i = 0; i < result.token_ids.size(); ++i) {
        std::cout << (i ? ", " : "") << result.token_ids[i];
    }
    std::cout << "]}" << std::endl;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 3) {
        die("usage: llama_cpp MODEL.gguf THREADS [--plain | SERVERS]");
    }
    llama_log_set(on_log, nullptr);
    ggml_backend_load_all();
    const std::string servers = argc > 3 ? argv[3] : "";
    const bool is_plain = servers == "--plain";
    if (!servers.empty() && !is_plain) {
        use_servers(servers);
    }
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = servers.empty() || is_plain ? 0 : 99;
    params.use_extra_bufts = !is_plain;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (model == nullptr) {
        die("cannot load the model");
    }
    Contender contender(model, std::atoi(argv[2]));
    print_about();
    for (std::string line; std::getline(std::cin, line);) {
        std::stringstream words(line);
        std::string verb;
        std::string path;
        int rows = 1;
        int steps = 1;
        words >> verb;
        if (verb == "logits") {
            words >> path;
        } else if (verb == "generate") {
            words >> rows >> steps;
        } else {
            die("unknown request " + verb);
        }
        std::vector<llama_token> prompt;
        for (llama_token token; words >> token;) {
            prompt.push_back(token);
        }
        if (verb == "logits") {
            contender.write_logits(path, prompt);
            std::cout << "{}" << std::endl;
            continue;
        }
        print(contender.generate(rows, steps, prompt));
    }
    return 0;
}

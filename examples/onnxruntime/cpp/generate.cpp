// Serves a package with ONNX Runtime's C++ API: one session, tasks are .onnx_adapter files, swapped per run.
//
//   edgeprompt export BASE -o dist --prompt-input optional
//   edgeprompt convert sentiment.safetensors -o sentiment.onnx_adapter
//   g++ -std=c++17 -I HEADERS generate.cpp LIBRARY -o generate
//   ./generate dist 16 12,7,431 sentiment.onnx_adapter:16 topic.onnx_adapter:8
//
// HEADERS and LIBRARY: docs/onnxruntime-c.md. Behind each adapter stands its number of virtual tokens (`edgeprompt inspect`
// prints it; an adapter cannot be asked from C). Takes token ids and prints new ones, a line for each task.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;

Ids numbers(const std::string& text) {
  Ids found;
  std::istringstream stream(text);
  for (std::string one; std::getline(stream, one, ',');) found.push_back(std::stoll(one));
  return found;
}

// What stands behind a key of edgeprompt.json, up to `end`. A program that has a JSON library uses that.
std::string field(const std::string& json, const std::string& key, char end) {
  auto at = json.find("\"" + key + "\":");
  if (at == std::string::npos) throw std::runtime_error("edgeprompt.json has no " + key);
  at += key.size() + 3;
  return json.substr(at, json.find(end, at) - at);
}

class Base {
 public:
  explicit Base(const std::string& folder) : session_(env_, (folder + "/model.onnx").c_str(), options()) {
    std::ifstream file(folder + "/edgeprompt.json");
    const std::string json((std::istreambuf_iterator<char>(file)), {});
    vocab_size_ = std::stoll(field(json, "vocab_size", ','));
    auto eos = field(json, "eos", ']');
    eos_ = numbers(eos.substr(eos.find('[') + 1));
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); i++) inputs_.push_back(session_.GetInputNameAllocated(i, allocator).get());
    // Logits and the cache; hidden_states is not needed here.
    outputs_.push_back("logits");
    for (size_t i = 0; i < inputs_.size(); i++) {
      if (inputs_[i].rfind("past_key_values", 0) != 0) continue;
      outputs_.push_back("present" + inputs_[i].substr(15));
      empty_shape_ = session_.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();  // [batch, heads, past, size]
    }
    empty_shape_[0] = 1;
    empty_shape_[2] = 0;
  }

  // Greedy token ids behind `count` virtual tokens, whose rows the adapter in `task` brings, and `ids`.
  Ids generate(const Ort::RunOptions& task, int64_t count, const Ids& ids, size_t max_new_tokens) {
    Ids sequence(count), found;
    std::iota(sequence.begin(), sequence.end(), vocab_size_);
    sequence.insert(sequence.end(), ids.begin(), ids.end());
    std::vector<Ort::Value> past;
    auto token = run(task, sequence, 0, past);
    auto length = static_cast<int64_t>(sequence.size());
    const Ort::RunOptions plain;  // behind the prefill, the virtual tokens' keys and values are in the cache
    while (found.size() < max_new_tokens && std::find(eos_.begin(), eos_.end(), token) == eos_.end()) {
      found.push_back(token);
      token = run(plain, {token}, length++, past);
    }
    return found;
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.AddConfigEntry("session.x64quantprecision", "1");  // int8 overflows on x86 without VNNI else
    return options;
  }

  // Runs `ids` behind `before` positions, grows `past`, and gives the likeliest next token.
  int64_t run(const Ort::RunOptions& options, Ids ids, int64_t before, std::vector<Ort::Value>& past) {
    const auto length = static_cast<int64_t>(ids.size());
    Ids mask(before + length, 1), positions(length);
    std::iota(positions.begin(), positions.end(), before);
    std::vector<float> nothing;
    std::vector<const char*> names, wanted;
    std::vector<Ort::Value> feeds;
    size_t layer = 0;
    for (const auto& name : inputs_) {
      names.push_back(name.c_str());
      if (name == "input_ids") feeds.push_back(tensor(ids));
      else if (name == "attention_mask") feeds.push_back(tensor(mask));
      else if (name == "position_ids") feeds.push_back(tensor(positions));
      else if (name.rfind("past_key_values", 0) != 0) throw std::runtime_error("export with --prompt-input optional: input " + name);
      else if (past.empty()) feeds.push_back(Ort::Value::CreateTensor<float>(memory_, nothing.data(), 0, empty_shape_.data(), 4));
      else feeds.push_back(std::move(past[layer++]));
    }
    for (const auto& name : outputs_) wanted.push_back(name.c_str());
    auto results = session_.Run(options, names.data(), feeds.data(), feeds.size(), wanted.data(), wanted.size());
    const float* end = results[0].GetTensorData<float>() + results[0].GetTensorTypeAndShapeInfo().GetElementCount();
    const float* last = end - results[0].GetTensorTypeAndShapeInfo().GetShape().back();
    past.assign(std::make_move_iterator(results.begin() + 1), std::make_move_iterator(results.end()));
    return std::max_element(last, end) - last;
  }

  Ort::Value tensor(Ids& values) {
    const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
    return Ort::Value::CreateTensor<int64_t>(memory_, values.data(), values.size(), shape, 2);
  }

  Ort::Env env_;
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;
  std::vector<int64_t> empty_shape_;
  int64_t vocab_size_;
  Ids eos_;
};

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("usage: generate PACKAGE MAX_NEW_TOKENS IDS ADAPTER:TOKENS ...");
  Base base(argv[1]);
  for (int i = 4; i < argc; i++) {
    const std::string task = argv[i];
    const auto colon = task.rfind(':');
    auto adapter = Ort::LoraAdapter::CreateLoraAdapter(task.substr(0, colon), nullptr);  // must outlive its options
    Ort::RunOptions options;
    options.AddActiveLoraAdapter(adapter);
    const auto found = base.generate(options, std::stoll(task.substr(colon + 1)), numbers(argv[3]), std::stoull(argv[2]));
    for (size_t j = 0; j < found.size(); j++) std::cout << (j ? "," : "") << found[j];
    std::cout << "\n";
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return EXIT_FAILURE;
}

// Finds objects in a picture with a package of `edet export --format aoti`; no Python is needed.
//
//     ./detect detector.pt2 ./libedet_kernels.so picture.ppm
//
// prints label, score and x1 y1 x2 y2 of each object. docs/deployment.md has the command that
// builds it.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <stdexcept>

// The pixels (3, h, w) uint8 of a binary PPM file without comments.
at::Tensor read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  if (!(file >> magic >> width >> height >> most) || magic != "P6" || most != 255) {
    throw std::runtime_error(std::string(path) + " is not a binary PPM file of 8 bits");
  }
  file.get();
  auto pixels = at::empty({height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
  if (!file) throw std::runtime_error(std::string(path) + " is cut off");
  return pixels.permute({2, 0, 1}).contiguous();
}

// The picture scaled to fit (H, W), at the top left; the rest is filled with a colour.
at::Tensor letterbox(const at::Tensor& picture, int64_t H, int64_t W, const int (&fill)[3]) {
  const int64_t h = picture.size(1), w = picture.size(2);
  const bool high = H * w <= W * h;
  const int64_t rows = high ? H : std::max<int64_t>(1, h * W / w);
  const int64_t columns = high ? std::max<int64_t>(1, w * H / h) : W;
  auto images = at::empty({1, 3, H, W}, at::kByte);
  for (int c = 0; c < 3; ++c) images.select(1, c).fill_(fill[c]);
  images.narrow(2, 0, rows)
      .narrow(3, 0, columns)
      .copy_(at::_upsample_bilinear2d_aa(picture.unsqueeze(0), {rows, columns}, false));
  return images;
}

int main(int count, char** arguments) try {
  if (count != 4) throw std::runtime_error("usage: detect PACKAGE LIBRARY PICTURE");
  if (!dlopen(arguments[2], RTLD_NOW)) throw std::runtime_error(dlerror());  // registers the ops
  torch::inductor::AOTIModelPackageLoader detector(arguments[1]);
  auto notes = detector.get_metadata();
  int H = 0, W = 0, fill[3] = {};
  std::sscanf(notes["image_size"].c_str(), "[%d, %d]", &H, &W);
  std::sscanf(notes["fill"].c_str(), "[%d, %d, %d]", &fill[0], &fill[1], &fill[2]);
  const auto picture = read_ppm(arguments[3]);
  auto sizes = at::tensor({picture.size(1), picture.size(2)}, at::kLong).unsqueeze(0);
  const auto found = detector.run({letterbox(picture, H, W, fill), sizes});
  const auto boxes = found[0][0], scores = found[1][0], labels = found[2][0];
  for (int64_t i = 0; i < found[3].item<int64_t>(); ++i) {
    const auto* box = boxes[i].data_ptr<float>();
    std::printf("%ld %.6f %.3f %.3f %.3f %.3f\n", labels[i].item<int64_t>(),
                scores[i].item<float>(), box[0], box[1], box[2], box[3]);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

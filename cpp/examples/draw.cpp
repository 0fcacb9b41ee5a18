// Draws one picture: draw_cpp BUNDLE PROMPT > picture.ppm
#include <iostream>
#include <sd35/sd35.hpp>

int main(int count, char** arguments) try {
    if (count != 3) return 2;
    sd35::Pipeline pipeline(arguments[1]);
    sd35::Request request(arguments[2]);
    request.seed = 7;
    const sd35::Result result = pipeline.generate(request);
    const auto pixels = result.image();
    std::cout << "P6 " << result.width() << ' ' << result.height() << " 255\n";
    std::cout.write(reinterpret_cast<const char*>(pixels.data()),
                    static_cast<std::streamsize>(pixels.size()));
} catch (const sd35::Error& error) {
    std::cerr << error.what() << '\n';
    return 1;
}

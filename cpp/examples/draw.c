/* Draws one picture: draw_c BUNDLE PROMPT > picture.ppm */
#include <sd35/sd35.h>
#include <stdio.h>
#include <string.h>

int main(int count, char** arguments) {
    if (count != 3) return 2;
    sd35_pipeline* pipeline = NULL;
    sd35_result* result = NULL;
    sd35_error* error = NULL;
    sd35_text prompt = {arguments[2], strlen(arguments[2])};
    sd35_request request;
    sd35_request_init(&request);
    request.prompts = &prompt;
    request.prompt_count = 1;
    request.seed = 7;
    if (sd35_pipeline_load(arguments[1], NULL, &pipeline, &error) == SD35_OK &&
        sd35_pipeline_generate(pipeline, &request, &result, &error) == SD35_OK) {
        size_t width = sd35_result_width(result), height = sd35_result_height(result);
        printf("P6 %zu %zu 255\n", width, height);
        fwrite(sd35_result_image(result, 0), 3, width * height, stdout);
    } else {
        fprintf(stderr, "%s\n", sd35_error_message(error));
    }
    int failed = result == NULL;
    sd35_error_free(error);
    sd35_result_free(result);
    sd35_pipeline_free(pipeline);
    return failed;
}

# Writes every template into one C++ source as string literals, sorted by name. Reproducible: no dates,
# no absolute paths.
#   cmake -DSOURCE_DIR=templates -DOUTPUT=embedded_templates.cpp -P embed.cmake
cmake_minimum_required(VERSION 3.22)

file(GLOB_RECURSE files RELATIVE ${SOURCE_DIR} ${SOURCE_DIR}/*.h ${SOURCE_DIR}/*.cuh)
list(SORT files)
list(LENGTH files count)

set(content "// Generated from templates/ by templates/embed.cmake.\n#include \"generator/template_source.h\"\n\n#include <array>\n\nnamespace treeattn {\nnamespace {\n\nconstexpr std::array<EmbeddedTemplate, ${count}> kTemplates{{\n")
foreach(name IN LISTS files)
  file(READ ${SOURCE_DIR}/${name} text)
  string(FIND "${text}" ")TREEATTN_TEXT\"" clash)
  if(NOT clash EQUAL -1)
    message(FATAL_ERROR "${name} holds the delimiter of the raw string literals")
  endif()
  string(APPEND content "    {\"${name}\", R\"TREEATTN_TEXT(${text})TREEATTN_TEXT\"},\n")
endforeach()
string(APPEND content "}};\n\n}  // namespace\n\nstd::span<const EmbeddedTemplate> embedded_templates() { return kTemplates; }\n\n}  // namespace treeattn\n")
file(WRITE ${OUTPUT}.new "${content}")
file(COPY_FILE ${OUTPUT}.new ${OUTPUT} ONLY_IF_DIFFERENT)
file(REMOVE ${OUTPUT}.new)

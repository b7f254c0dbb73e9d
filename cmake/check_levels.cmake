# Fails when an object of a higher instruction-set level defines a weak symbol that other objects may define too (a
# function template of the standard library, say): the linker keeps one copy for all, and the module would then
# crash on a processor without that level. Called with -DNM, -DLEVEL and -DOBJECTS.
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "10specbranch(3cpu)?[0-9]${LEVEL}|DW\\.ref\\.")
if(weak)
  list(JOIN weak "\n  " weak)
  message(FATAL_ERROR "Symbols of level ${LEVEL} outside its namespace:\n  ${weak}")
endif()

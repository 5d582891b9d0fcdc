// Appended to a C++ source: makes its kernels callable from Python. A kernel receives a tensor as the pointer to its
// numbers. Torch has bindings too, but for one kernel per file, and they take longer to compile than the kernels.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <type_traits>
#include <utility>

namespace {

void* (*data_pointer)(PyObject* tensor);

template <typename T>
T convert(PyObject* given) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(data_pointer(given));
    } else if constexpr (std::is_floating_point_v<T>) {
        return static_cast<T>(PyFloat_AsDouble(given));
    } else {
        return static_cast<T>(PyLong_AsLongLong(given));
    }
}

template <auto kernel>
struct Function;

template <typename... T, void (*kernel)(T...)>
struct Function<kernel> {
    template <size_t... i>
    static void call(PyObject* const* given, std::index_sequence<i...>) {
        [](T... arguments) {
            if (!PyErr_Occurred()) {
                kernel(arguments...);
            }
        }(convert<T>(given[i])...);
    }

    static PyObject* of(PyObject*, PyObject* const* given, Py_ssize_t count) {
        if (count != sizeof...(T)) {
            return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(T), count);
        }
        call(given, std::index_sequence_for<T...>());
        return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    }

    static inline PyMethodDef method = {"kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(of)),
                                        METH_FASTCALL, nullptr};
};

template <auto... kernel>
PyObject* tuple_of() {
    PyObject* const functions = PyTuple_New(sizeof...(kernel));
    Py_ssize_t next = 0;
    (PyTuple_SetItem(functions, next++, PyCFunction_New(&Function<kernel>::method, nullptr)), ...);
    return functions;
}

}  // namespace

// Return a tuple of Python functions, one for each kernel. `pointer` returns the pointer to a tensor's numbers.
PyMODINIT_FUNC functions(void* (*pointer)(PyObject*)) {
    data_pointer = pointer;
    return tuple_of<KERNELS>();
}

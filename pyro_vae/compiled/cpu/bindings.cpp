// The end of a file of kernels, which makes functions of Python of them. A tensor goes to a kernel as the pointer to
// its numbers. Torch's own, which are for one kernel each, take the compiler longer than the kernels.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <type_traits>
#include <utility>

namespace {

void* (*numbers_of)(PyObject* tensor);

template <typename T>
T argument(PyObject* given) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(numbers_of(given));
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
        }(argument<T>(given[i])...);
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

// The functions of the kernels, given what returns the pointer to a tensor's numbers.
PyMODINIT_FUNC functions(void* (*pointer)(PyObject*)) {
    numbers_of = pointer;
    return tuple_of<KERNELS>();
}
